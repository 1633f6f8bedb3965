package driver

import (
	"fmt"
	"strings"

	"github.com/snapmerge/snapmerge/pkg/snapshot"
)

// tokenPrefix begins a paging token; the id of the last entry of the page before
// follows. So pages stay right whatever is made and deleted between them.
const tokenPrefix = "after:"

// page returns the entries, sorted by id, that come after the token, at most
// most (0: all), and the token of the page after them, "" if there is none.
func page[T any](sorted []T, most int32, token string, id func(T) string) ([]T, string, error) {
	if most < 0 {
		return nil, "", invalid("max_entries is %d", most)
	}
	if token != "" {
		after, ok := strings.CutPrefix(token, tokenPrefix)
		if !ok || snapshot.CheckID(after) != nil {
			return nil, "", fmt.Errorf("%w: starting_token %q is none of ours", errToken, token)
		}
		for len(sorted) > 0 && id(sorted[0]) <= after {
			sorted = sorted[1:]
		}
	}
	if most == 0 || len(sorted) <= int(most) {
		return sorted, "", nil
	}
	return sorted[:most], tokenPrefix + id(sorted[most-1]), nil
}

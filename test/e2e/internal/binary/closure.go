package binary

import (
	"context"
	"regexp"
)

var installs = regexp.MustCompile(`(?m)^Inst (\S+) `)

// Closure are the packages that the distribution would install for one on an empty
// machine, as far as keep matches their names and drop does not.
func Closure(ctx context.Context, name string, keep, drop *regexp.Regexp) ([]string, error) {
	// With no package installed, and nothing done.
	args := []string{"install", "--simulate", "--no-install-recommends", "-o", "Dir::State::status=/dev/null", name}
	out, err := Output(ctx, "", "apt-get", args...)
	if err != nil {
		if err := run(ctx, "", "apt-get", "update", "-q"); err != nil {
			return nil, err
		}
		if out, err = Output(ctx, "", "apt-get", args...); err != nil {
			return nil, err
		}
	}
	var names []string
	for _, m := range installs.FindAllStringSubmatch(out, -1) {
		if keep.MatchString(m[1]) && !drop.MatchString(m[1]) {
			names = append(names, m[1])
		}
	}
	return names, nil
}

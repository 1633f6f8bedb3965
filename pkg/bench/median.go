package bench

import (
	"cmp"
	"slices"
)

// spread is what is said about a list of times.
type spread struct{ mid, min, max float64 }

// median returns the spread of a list that is not empty, and the index of the
// element in the middle, the lower one of two.
func median(list []float64) (spread, int) {
	order := make([]int, len(list))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(list[a], list[b]) })
	low, high := order[(len(order)-1)/2], order[len(order)/2]
	return spread{mid: (list[low] + list[high]) / 2, min: list[order[0]], max: list[order[len(order)-1]]}, low
}

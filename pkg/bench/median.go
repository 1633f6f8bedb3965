package bench

import (
	"cmp"
	"slices"
	"time"
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

// Median is the median of a value of all runs, of which there is one at least.
func Median[T any](runs []T, value func(T) float64) float64 {
	list := make([]float64, len(runs))
	for i, r := range runs {
		list[i] = value(r)
	}
	s, _ := median(list)
	return s.mid
}

// Compare is Median, and the median of the ratios to the value of with in the same
// turn.
func Compare[T any](runs, with []T, value func(T) float64) (mid, ratio float64) {
	ratios := make([]float64, len(runs))
	for i, r := range runs {
		ratios[i] = value(r) / value(with[i])
	}
	s, _ := median(ratios)
	return Median(runs, value), s.mid
}

// percentiles sorts times, at least one, and returns what half and 99 of 100 took at
// most, in seconds.
func percentiles(took []time.Duration) (p50, p99 float64) {
	slices.Sort(took)
	return took[len(took)/2].Seconds(), took[len(took)*99/100].Seconds()
}

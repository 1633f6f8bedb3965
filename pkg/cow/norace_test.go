//go:build !race

package cow_test

const raceDetector = false

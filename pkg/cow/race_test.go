//go:build race

package cow_test

// raceDetector tells whether it is on: everything takes some ten times as long.
const raceDetector = true

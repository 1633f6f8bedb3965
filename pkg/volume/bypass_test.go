package volume

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestBypass: what the kernel has counted of a device counts while the device is
// followed, and whatever happens to its file nothing is taken back.
func TestBypass(t *testing.T) {
	file := filepath.Join(t.TempDir(), "stat")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	var b bypass
	check := func(what string, want kernelCounts) {
		t.Helper()
		if got := b.value(); got != want {
			t.Errorf("%s: %+v, want %+v", what, got, want)
		}
	}
	check("nothing", kernelCounts{})

	write("  10 0 80 5 20 0 160 6 1 7 11 3 0 24 2 4 1\n")
	b.followFile(file, true)
	check("just begun", kernelCounts{inFlight: 1})
	write("  11 9 88 8 22 9 176 10 2 9 11 4 9 32 5 7 5\n")
	want := kernelCounts{
		read: kernelRequests{1, 4096, ms(3)}, write: kernelRequests{2, 8192, ms(4)}, zero: kernelRequests{1, 4096, ms(3)}, flush: kernelRequests{3, 0, ms(4)},
		inFlight: 2,
	}
	check("requests", want)
	b.followFile(file, true)
	check("followed already", want)
	want.inFlight = 0
	for _, bad := range []string{"", "1 2 3\n", "a b c d e f g h i j k l m n o p q\n"} {
		write(bad)
		check("file "+bad, want)
	}
	b.followFile("", false)
	check("no more", want)

	write("  100 0 800 50 200 0 1600 60 0 70 110 30 0 240 20 40 10\n")
	b.followFile(file, false)
	check("another time", want)
	write("  101 0 808 51 200 0 1600 60 0 70 110 31 0 248 21 41 11\n")
	want.read = kernelRequests{2, 8192, ms(4)}
	check("reads and writes alone", want)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	check("gone", want)
	b.follow("", false)
	check("at last", want)
}

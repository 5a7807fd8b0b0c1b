package slack

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSlack: a program with the entry has our slack on all threads, one without it and one that was started with somebody's slack have
// what they were given; what they execute has the kernel's or that, and after Settle so do all their threads.
func TestSlack(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: a thread may not look at another's slack otherwise")
	}
	for _, c := range []struct {
		entry                   bool
		given                   uintptr
		first, program, settled string
	}{
		{false, usual, "50000", "50000", "50000"},
		{true, usual, "500000", "50000", "50000"},
		{true, 1000, "1000", "1000", "1000"},
		{true, 70000000, "70000000", "70000000", "70000000"},
		{false, wider, "2000000", "50000", "50000"},
	} {
		if c.entry && runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
			t.Log("no entry for this architecture")
			continue
		}
		bin := build(t, c.entry)
		var out []byte
		err := given(c.given, func() (err error) {
			cmd := exec.Command(bin)
			cmd.Stderr = os.Stderr
			out, err = cmd.Output()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		var got [][]string
		if err := json.Unmarshal(out, &got); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if want := [][]string{{c.first}, {c.program}, {c.settled}}; !reflect.DeepEqual(got, want) {
			t.Errorf("entry %v, given %d: got %v, want %v", c.entry, c.given, got, want)
		}
	}
}

// given calls f on a thread with that slack, which ends with it.
func given(slack uintptr, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so that the thread ends
		err := unix.Prctl(unix.PR_SET_TIMERSLACK, slack, 0, 0, 0)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func build(t *testing.T, entry bool) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "tell")
	args := []string{"build", "-o", bin}
	if entry {
		args = append(args, "-ldflags=-E conexEntry")
	}
	cmd := exec.Command("go", append(args, "./testdata/tell")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return bin
}

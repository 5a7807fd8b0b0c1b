package pidfd_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"conex/internal/linux/pidfd"
)

// child starts a shell command, whose end this test collects by its pidfd alone.
func child(t *testing.T, script string) (*os.File, int) {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := pidfd.Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pidfd.SendSignal(f, unix.SIGKILL); err == nil {
			if _, err := pidfd.Wait(f); err != nil {
				t.Error(err)
			}
		}
		f.Close()
	})
	return f, cmd.Process.Pid
}

func TestStatus(t *testing.T) {
	for script, want := range map[string]struct {
		status pidfd.Status
		code   int
	}{
		"exit 0":              {pidfd.Status{}, 0},
		"exit 255":            {pidfd.Status{Code: 255}, 255},
		"kill -TERM $$":       {pidfd.Status{Signal: unix.SIGTERM}, 143},
		"kill -KILL $$":       {pidfd.Status{Signal: unix.SIGKILL}, 137},
		"ulimit -c 0; exit 7": {pidfd.Status{Code: 7}, 7},
	} {
		f, _ := child(t, script)
		got, err := pidfd.Wait(f)
		if err != nil || got != want.status || got.ExitCode() != want.code {
			t.Errorf("%s: %+v (%d), %v; want %+v", script, got, got.ExitCode(), err, want)
		}
		if _, err := pidfd.Wait(f); !errors.Is(err, pidfd.ErrExited) {
			t.Errorf("%s: second wait: %v", script, err)
		}
		if _, err := pidfd.GetPid(f); !errors.Is(err, pidfd.ErrExited) {
			t.Errorf("%s: number of a collected process: %v", script, err)
		}
		if err := pidfd.SendSignal(f, 0); !errors.Is(err, pidfd.ErrExited) {
			t.Errorf("%s: signal to a collected process: %v", script, err)
		}
	}
}

func TestSignalAndPoll(t *testing.T) {
	f, pid := child(t, "exec sleep 1000")
	if got, err := pidfd.GetPid(f); got != pid || err != nil {
		t.Errorf("GetPid = %d, %v; want %d", got, err, pid)
	}
	if _, exited, err := pidfd.TryWait(f); exited || err != nil {
		t.Errorf("TryWait of a running process: %v, %v", exited, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- pidfd.Poll(ctx, f) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled poll: %v", err)
	}
	if _, err := pidfd.WaitContext(ctx, f); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled wait: %v", err)
	}
	go func() { done <- pidfd.Poll(t.Context(), f) }()
	if err := pidfd.SendSignal(f, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("poll: %v", err)
	}
	s, err := pidfd.WaitContext(t.Context(), f)
	if err != nil || s.Signal != syscall.SIGINT {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestNoProcess(t *testing.T) {
	if _, err := pidfd.Open(1 << 22); !errors.Is(err, pidfd.ErrExited) { // above the kernel's limit of process numbers
		t.Errorf("open: %v", err)
	}
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := pidfd.GetPid(f); err == nil {
		t.Error("/dev/null has a process number")
	}
	if _, err := pidfd.Wait(f); err == nil || errors.Is(err, pidfd.ErrExited) {
		t.Errorf("wait for /dev/null: %v", err)
	}
}

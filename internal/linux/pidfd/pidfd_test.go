package pidfd_test

import (
	"context"
	"errors"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"conex/internal/linux/pidfd"
)

func TestSignalAndPoll(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := pidfd.Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- pidfd.Poll(ctx, f) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled poll: %v", err)
	}
	go func() { done <- pidfd.Poll(t.Context(), f) }()
	if err := pidfd.SendSignal(f, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("poll: %v", err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGINT {
		t.Errorf("it ended with %v", err)
	}
	if err := pidfd.SendSignal(f, 0); !errors.Is(err, pidfd.ErrExited) {
		t.Errorf("signal to a collected process: %v", err)
	}
}

func TestNoProcess(t *testing.T) {
	if _, err := pidfd.Open(1 << 22); !errors.Is(err, pidfd.ErrExited) { // above the kernel's limit of process numbers
		t.Errorf("open: %v", err)
	}
}

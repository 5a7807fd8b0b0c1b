package sigforward

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// signals are those of the test.
var signals = []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGCONT, unix.SIGWINCH, unix.SIGTTIN}

// TestMain is the forwarding program too: its argument is whom to forward to.
func TestMain(m *testing.M) {
	pid := os.Getenv("SIGFORWARD_TEST_PID")
	if pid == "" {
		os.Exit(m.Run())
	}
	n, err := strconv.Atoi(pid)
	if err == nil {
		var fd int
		if fd, err = unix.PidfdOpen(n, 0); err == nil {
			err = To(fd, signals...)
		}
	}
	fmt.Println("ready", err)
	stop := make(chan struct{})
	go func() { // Go goes on beside: collects, switches
		var keep [][]byte
		for len(keep) < 1<<20 {
			keep = append(keep, make([]byte, 64))
			if len(keep) == 1000 {
				keep = nil
			}
		}
		close(stop)
	}()
	<-stop
}

// TestForward: what is sent to the program arrives at the other one, and the program runs on, also when nobody is there any more.
func TestForward(t *testing.T) {
	script := "for s in HUP INT QUIT TERM USR1 USR2 CONT WINCH TTIN; do trap \"echo got $s\" $s; done; echo ready; while :; do read -r line; done"
	target := exec.Command("sh", "-c", script)
	in, err := target.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	heard := start(t, target)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := exec.Command(self)
	program.Env = append(os.Environ(), "SIGFORWARD_TEST_PID="+strconv.Itoa(target.Process.Pid))
	start(t, program)
	for _, s := range signals {
		for range 20 {
			if err := program.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
			if _, err := in.Write([]byte("\n")); err != nil { // the shell looks after its traps
				t.Fatal(err)
			}
			want := "got " + strings.TrimPrefix(unix.SignalName(s), "SIG")
			if !heard.Scan() || heard.Text() != want {
				t.Fatalf("%q, want %q", heard.Text(), want)
			}
		}
	}
	if err := target.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = target.Wait() // killed
	for _, s := range signals {
		if err := program.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := program.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the program is gone: %v", err)
	}
}

// start starts a program and waits for its first line.
func start(t *testing.T, c *exec.Cmd) *bufio.Scanner {
	t.Helper()
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill() // it may have ended
		_ = c.Wait()
	})
	s := bufio.NewScanner(out)
	if !s.Scan() || s.Text() != "ready" && s.Text() != "ready <nil>" {
		t.Fatalf("%v says %q", c.Args, s.Text())
	}
	return s
}

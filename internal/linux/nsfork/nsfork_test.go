package nsfork

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func wait(t *testing.T, pid int) unix.WaitStatus {
	t.Helper()
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return ws
	}
}

// sharing makes the tests' children share memory, where they can.
var sharing bool

// both runs a test with the fork, with shared memory and without, and with the stage.
func both(t *testing.T, f func(t *testing.T)) {
	t.Run("fork", f)
	sharing = true
	t.Run("shared", f)
	sharing = false
	Staged.Store(true)
	defer Staged.Store(false)
	t.Run("stage", f)
}

// TestWithoutClone3 runs itself behind a filter that does not know the call, as around some containers: the stage takes over, and is
// remembered.
func TestWithoutClone3(t *testing.T) {
	const denied = "NSFORK_TEST_DENIED"
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var p Program
	p.Call("dup", unix.SYS_DUP3, w, 1, 0)
	if os.Getenv(denied) != "" {
		p.Exec("/bin/echo", []string{"echo", "ok"}, nil)
	} else {
		filter := []unix.SockFilter{
			{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS},
			{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_CLONE3, Jf: 1},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		}
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		p.Call("no new privileges", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		p.Call("filter", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
		p.Exec(self, []string{self, "-test.run=^TestWithoutClone3$"}, append(os.Environ(), denied+"=1"))
	}
	pid, pidfd, err := p.Start(Attr{Share: sharing})
	if err != nil {
		t.Fatal(err)
	}
	pidfd.Close()
	w.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if ws := wait(t, pid); ws.ExitStatus() != 0 {
		t.Errorf("status %v: %s", ws, out)
	}
	if os.Getenv(denied) != "" && (!Staged.Load() || string(out) != "ok\n") {
		t.Errorf("stage %v, output %q", Staged.Load(), out)
	}
}

// TestUserNamespace: a child that is made in one, and one that enters it, which a process of several threads could not.
func TestUserNamespace(t *testing.T) { both(t, testUserNamespace) }

func testUserNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	var p Program
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p.Call("close", unix.SYS_CLOSE, w)
	p.Ready()
	p.Call("wait", unix.SYS_READ, r, make([]byte, 8), 1)
	p.Exit(0)
	holder, pidfd, err := p.Start(Attr{Share: sharing, Flags: unix.CLONE_NEWUSER})
	if err != nil {
		t.Fatal(err)
	}
	pidfd.Close()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/uid_map", holder), []byte("0 100000 10"), 0); err != nil {
		t.Fatal(err)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", holder))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	w.Close()
	if ws := wait(t, holder); ws.ExitStatus() != 0 {
		t.Errorf("the holder: %v", ws)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer outR.Close()
	var q Program
	q.Call("dup", unix.SYS_DUP3, outW, 1, 0)
	q.Call("enter", unix.SYS_SETNS, ns, unix.CLONE_NEWUSER)
	q.Fork(unix.CLONE_NEWPID)
	q.Exec("/bin/sh", []string{"sh", "-c", "echo $$; cat /proc/self/uid_map"}, []string{"PATH=/bin:/usr/bin"})
	pid, pidfd, err := q.Start(Attr{Share: sharing})
	if err != nil {
		t.Fatal(err)
	}
	pidfd.Close()
	outW.Close()
	out, err := io.ReadAll(outR)
	if ws := wait(t, pid); err != nil || ws.ExitStatus() != 0 || strings.Join(strings.Fields(string(out)), " ") != "1 0 100000 10" {
		t.Errorf("%q, %v, %v", out, err, ws)
	}
}

func TestExecWithOutput(t *testing.T) { both(t, testExecWithOutput) }

func testExecWithOutput(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var p Program
	p.Call("dup", unix.SYS_DUP3, w, 1, 0)
	p.Exec("/bin/sh", []string{"sh", "-c", `echo "$A $0"; exit 7`}, []string{"A=b"})
	pid, pidfd, err := p.Start(Attr{Share: sharing})
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	w.Close()
	out, err := io.ReadAll(r)
	if err != nil || string(out) != "b sh\n" {
		t.Fatalf("got %q, %v", out, err)
	}
	if ws := wait(t, pid); ws.ExitStatus() != 7 {
		t.Fatalf("status %v", ws)
	}
}

func TestFailureNamesTheCall(t *testing.T) { both(t, testFailureNamesTheCall) }

func testFailureNamesTheCall(t *testing.T) {
	var p Program
	p.Try("tolerated", unix.SYS_CHDIR, "/no/such")
	p.Exec("/no/such/program", []string{"x"}, nil)
	_, _, err := p.Start(Attr{Share: sharing})
	var e *Error
	if !errors.As(err, &e) || e.Call != "execve" || e.Errno != unix.ENOENT {
		t.Fatalf("got %v", err)
	}
}

func TestRefsAndConditions(t *testing.T) { both(t, testRefsAndConditions) }

func testRefsAndConditions(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var p Program
	dup := p.Call("dup", unix.SYS_DUP, w)
	p.Call("write", unix.SYS_WRITE, dup, []byte("a"), 1)
	bad := p.Try("bad", unix.SYS_CLOSE, 9999)
	p.Unless(p.Call("write", unix.SYS_WRITE, dup, []byte("b"), 1), bad)
	p.OnlyIf(p.Call("write", unix.SYS_WRITE, dup, []byte("c"), 1), bad)
	good := p.Try("good", unix.SYS_GETPID)
	p.Unless(p.Call("write", unix.SYS_WRITE, dup, []byte("d"), 1), good)
	p.OnlyIf(p.Call("write", unix.SYS_WRITE, dup, []byte("e"), 1), good)
	p.Exit(0)
	pid, pidfd, err := p.Start(Attr{Share: sharing})
	if err != nil {
		t.Fatal(err)
	}
	pidfd.Close()
	w.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	wait(t, pid)
	if string(out) != "abe" {
		t.Fatalf("got %q", out)
	}
}

func TestNamespacesAndInit(t *testing.T) { both(t, testNamespacesAndInit) }

func testNamespacesAndInit(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root for a pid namespace")
	}
	for _, init := range []bool{false, true} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var p Program
		p.Call("dup", unix.SYS_DUP3, w, 1, 0)
		p.Exec("/bin/sh", []string{"sh", "-c", `echo $$; kill -TERM $$; exit 3`}, nil)
		pid, pidfd, err := p.Start(Attr{Share: sharing, Flags: unix.CLONE_NEWPID, Init: init})
		if err != nil {
			t.Fatal(err)
		}
		pidfd.Close()
		w.Close()
		out, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		ws := wait(t, pid)
		// Without an init the shell is pid 1, which its own TERM can't kill; behind one it is pid 2 and dies of it.
		want, code := "1", 3
		if init {
			want, code = "2", 128+15
		}
		if strings.TrimSpace(string(out)) != want || ws.ExitStatus() != code {
			t.Fatalf("init %v: pid %q status %v", init, out, ws)
		}
	}
}

func TestCloseOthers(t *testing.T) { both(t, testCloseOthers) }

func testCloseOthers(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range []int{50, 500} { // below and above the report pipe's number, not close-on-exec
		if err := unix.Dup2(0, fd); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
	}
	var p Program
	p.Call("dup", unix.SYS_DUP3, w, 1, 0)
	p.CloseOthers(3)
	for _, fd := range []int{50, 500, int(w.Fd())} {
		look := p.Try("look", unix.SYS_FCNTL, fd, unix.F_GETFD, 0)
		p.OnlyIf(p.Call("descriptor is open", unix.SYS_CHDIR, "/no/such"), look)
	}
	p.Exec("/bin/sh", []string{"sh", "-c", "echo /proc/self/fd/*"}, nil)
	pid, pidfd, err := p.Start(Attr{Share: sharing})
	if err != nil {
		t.Fatal(err)
	}
	pidfd.Close()
	w.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	wait(t, pid)
	if strings.Contains(string(out), "/50") {
		t.Errorf("open: %s", out)
	}
	// A failure after the descriptors are closed must still be reported.
	var q Program
	q.CloseOthers(3)
	q.Exec("/no/such/program", []string{"x"}, nil)
	if _, _, err := q.Start(Attr{Share: sharing}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("got %v", err)
	}
}

func TestHold(t *testing.T) { both(t, testHold) }

func testHold(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "start")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		command string
		want    error
	}{{"/bin/true", nil}, {"/no/such", unix.ENOENT}} {
		f, err := os.OpenFile(fifo, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		report, err := os.OpenFile(filepath.Join(dir, "report"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		ready, done, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var p Program
		p.Await(ready)
		p.CloseOthers(3, f, report)
		p.Hold(f, report)
		p.Exec(tc.command, []string{"x"}, nil)
		forked := 0
		pid, pidfd, err := p.Start(Attr{Share: sharing, Forked: func(pid int) error {
			forked = pid
			_, err := done.Write([]byte{0})
			return err
		}})
		if err != nil || forked != pid {
			t.Fatalf("start: %v (forked %d, pid %d)", err, forked, pid)
		}
		ready.Close()
		done.Close()
		f.Close()
		report.Close()
		// The child is the only reader now.
		w, err := unix.Open(fifo, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatalf("held child: %v", err)
		}
		if _, err := unix.Write(w, []byte{0}); err != nil {
			t.Fatal(err)
		}
		fds := []unix.PollFd{{Fd: int32(w)}}
		for {
			if _, err := unix.Poll(fds, -1); err != unix.EINTR {
				break
			}
		}
		unix.Close(w)
		pidfd.Close()
		wait(t, pid)
		b, err := os.ReadFile(filepath.Join(dir, "report"))
		if err != nil {
			t.Fatal(err)
		}
		if err := ReadReport(b); !errors.Is(err, tc.want) || tc.want != nil && err.Error() != "execve: no such file or directory" {
			t.Errorf("%s: %v", tc.command, err)
		}
		if _, err := unix.Open(fifo, unix.O_WRONLY|unix.O_NONBLOCK, 0); err != unix.ENXIO {
			t.Errorf("%s: the pipe still has a reader: %v", tc.command, err)
		}
	}
}

func TestForkedMayRefuse(t *testing.T) { both(t, testForkedMayRefuse) }

func testForkedMayRefuse(t *testing.T) {
	ready, done, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	defer done.Close()
	no := errors.New("no")
	var child int
	var p Program
	p.Await(ready)
	p.Exec("/bin/true", []string{"true"}, nil)
	if _, _, err := p.Start(Attr{Share: sharing, Forked: func(pid int) error { child = pid; return no }}); err != no {
		t.Fatalf("got %v", err)
	}
	if err := unix.Kill(child, 0); err != unix.ESRCH {
		t.Errorf("the child is there: %v", err)
	}
}

// TestStress forks from many goroutines while the collector runs: the child must never depend on the runtime's state.
func TestStress(t *testing.T) {
	t.Run("fork", func(t *testing.T) { testStress(t, Attr{}) })
	t.Run("shared", func(t *testing.T) { testStress(t, Attr{Share: true}) })
}

func testStress(t *testing.T, attr Attr) {
	n := 400
	if testing.Short() {
		n = 50
	}
	stop := make(chan struct{})
	var bg sync.WaitGroup
	bg.Add(1)
	go func() {
		defer bg.Done()
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	}()
	var wg sync.WaitGroup
	errs := make(chan error, 8)
	for range 8 {
		wg.Go(func() {
			for range n / 8 {
				var p Program
				p.Call("umask", unix.SYS_UMASK, 0o22)
				p.Exec("/bin/true", []string{"true"}, nil)
				pid, pidfd, err := p.Start(attr)
				if err != nil {
					errs <- err
					return
				}
				pidfd.Close()
				var ws unix.WaitStatus
				for {
					_, err = unix.Wait4(pid, &ws, 0, nil)
					if err != unix.EINTR {
						break
					}
				}
				if err != nil || ws.ExitStatus() != 0 {
					errs <- errors.New("bad exit")
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	bg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
}

// TestForkAgain makes a process in a pid namespace that the first child made, with and without an init, and reads a failure of it.
func TestForkAgain(t *testing.T) { both(t, testForkAgain) }

func testForkAgain(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root for a pid namespace")
	}
	for _, init := range []bool{false, true} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var p Program
		p.Call("dup", unix.SYS_DUP3, w, 1, 0)
		p.Fork(unix.CLONE_NEWPID)
		p.Init()
		p.Exec("/bin/sh", []string{"sh", "-c", `echo $$ $PPID; exit 3`}, nil)
		pid, pidfd, err := p.Start(Attr{Init: init})
		if err != nil {
			t.Fatal(err)
		}
		pidfd.Close()
		w.Close()
		out, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		want := "1 0\n"
		if init {
			want = "2 1\n"
		}
		if ws := wait(t, pid); string(out) != want || ws.ExitStatus() != 3 {
			t.Errorf("init %v: %q, status %v", init, out, ws)
		}
	}
	for want, build := range map[string]func(*Program){
		"before": func(p *Program) {
			p.Call("before", unix.SYS_CHDIR, "/no/such")
			p.Fork(unix.CLONE_NEWPID)
			p.Exec("/bin/true", []string{"true"}, nil)
		},
		"after": func(p *Program) {
			p.Fork(unix.CLONE_NEWPID)
			p.Call("after", unix.SYS_CHDIR, "/no/such")
			p.Exec("/bin/true", []string{"true"}, nil)
		},
	} {
		var p Program
		build(&p)
		_, _, err := p.Start(Attr{Share: sharing})
		var e *Error
		if !errors.As(err, &e) || e.Call != want || e.Errno != unix.ENOENT {
			t.Errorf("%s: %v", want, err)
		}
	}
	var ws unix.WaitStatus
	if pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil); err != unix.ECHILD {
		t.Errorf("a child was left: %d, %v", pid, err)
	}
}

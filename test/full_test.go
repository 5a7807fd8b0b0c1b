package test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	reg "github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"

	"conex/internal/disk"
)

// inMountNamespace runs the test in a child that has a mount namespace of its own and says whether this is the child. Whatever the child
// mounts, loop devices too, goes with it however it ends.
func inMountNamespace(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts file systems")
	}
	if testing.Short() {
		t.Skip("-short: it fills file systems again and again")
	}
	if os.Getenv("CONEX_TEST_MOUNTS") == t.Name() {
		return true
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^"+t.Name()+"$", "-test.v="+strconv.FormatBool(testing.Verbose()))
	cmd.Env = append(os.Environ(), "CONEX_TEST_MOUNTS="+t.Name())
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	runtime.LockOSThread() // its death would be the child's
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
	return false
}

// small is a conex whose root lies on a small file system.
type small struct {
	t         *testing.T
	bin       string
	fs, state string
	tmp       string
	env       []string
}

func mount(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Fatalf("mount %v: %v: %s", args, err, out)
	}
	at := args[len(args)-1]
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", at, err)
		}
	})
}

func newSmall(t *testing.T, kind string, size int64) *small {
	t.Helper()
	s := &small{t: t, bin: binary(t), tmp: t.TempDir()}
	s.fs, s.state = filepath.Join(s.tmp, "fs"), filepath.Join(s.tmp, "state")
	for _, d := range []string{s.fs, s.state} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mount(t, "-t", "tmpfs", "tmpfs", s.state)
	switch kind {
	case "tmpfs":
		mount(t, "-t", "tmpfs", "-o", fmt.Sprint("size=", size), "tmpfs", s.fs)
	default:
		img := filepath.Join(s.tmp, "fs.img")
		f, err := os.Create(img)
		if err == nil {
			err = errors.Join(f.Truncate(size), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", img).CombinedOutput(); err != nil {
			t.Skipf("mkfs.ext4: %v: %s", err, out)
		}
		mount(t, "-o", "loop", img, s.fs)
	}
	s.env = append(os.Environ(), "CONEX_ROOT="+s.fs+"/root", "CONEX_STATE="+s.state, "CONEX_CONFIG="+s.tmp+"/config.toml")
	t.Cleanup(func() { s.try("system", "teardown") })
	return s
}

func (s *small) try(args ...string) (string, error) {
	cmd := exec.Command(s.bin, args...)
	cmd.Env = s.env
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (s *small) run(args ...string) string {
	s.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.t.Fatalf("conex %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// fill leaves kb kilobytes free until the returned function is called.
func (s *small) fill(kb int64) (empty func()) {
	s.t.Helper()
	path := filepath.Join(s.fs, "ballast")
	f, err := os.Create(path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	// What a file system needs to know of a file counts too, so this takes a few turns.
	for range 8 {
		unix.Sync()
		free, _, err := disk.Free(s.fs)
		if err != nil {
			s.t.Fatal(err)
		}
		more := free - kb<<10
		if more < 4096 {
			break
		}
		fi, err := f.Stat()
		if err != nil {
			s.t.Fatal(err)
		}
		if err := unix.Fallocate(int(f.Fd()), 0, fi.Size(), more); err != nil && err != unix.ENOSPC {
			s.t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			s.t.Error(err)
		}
	}
}

// used is what df says, which must be what du says.
func (s *small) used() int64 {
	s.t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(s.run("system", "df", "-v", "--format", "{{.Size}}")), 10, 64)
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := exec.Command("du", "-s", "--block-size=1", s.fs+"/root").Output()
	if err != nil {
		s.t.Fatal(err)
	}
	if du := strings.Fields(string(out))[0]; du != strconv.FormatInt(n, 10) {
		s.t.Errorf("df says %d, du %s", n, du)
	}
	return n
}

func noiseFile(t *testing.T, path string, n int64) {
	t.Helper()
	f, err := os.Create(path)
	if err == nil {
		_, err = io.CopyN(f, rand.Reader, n)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestFullDisk has a disk fill up in the middle of everything that writes, with room for less and for more of it: one error that says
// what to do, what was there before whole and usable, and the space given back.
func TestFullDisk(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	registry := httptest.NewServer(reg.New(reg.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(registry.Close)
	remote := strings.TrimPrefix(registry.URL, "http://") + "/big"
	busybox, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"ext4", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			s := newSmall(t, kind, 96<<20)
			ctx, big, tarball := filepath.Join(s.tmp, "ctx"), filepath.Join(s.tmp, "big.tar"), filepath.Join(s.tmp, "base.tar")
			if err := os.Mkdir(ctx, 0o755); err != nil {
				t.Fatal(err)
			}
			noiseFile(t, filepath.Join(ctx, "data"), 3<<20)
			if err := os.WriteFile(filepath.Join(ctx, "Dockerfile"), []byte("FROM busybox\nCOPY data /\nRUN --network=none cp /data /more\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("tar", "-C", ctx, "-cf", tarball, "data").CombinedOutput(); err != nil {
				t.Fatalf("tar: %v %s", err, out)
			}
			s.run("import", "-c", `CMD ["true"]`, busybox, "busybox")
			s.run("build", "-q", "-t", remote, ctx)
			s.run("push", "-q", remote)
			s.run("save", "-o", big, remote)
			s.run("rmi", remote)
			s.run("builder", "prune", "-af")
			s.run("run", "--network", "none", "--name", "box", "busybox", "sh", "-c", "head -c 3000000 /dev/urandom > /own; echo x > /x")
			for _, op := range []struct {
				name string
				args []string
				undo []string
			}{
				{"pull", []string{"pull", "-q", remote}, []string{"rmi", remote}},
				{"load", []string{"load", "-q", "-i", big}, []string{"rmi", remote}},
				{"import", []string{"import", tarball, "imported"}, []string{"rmi", "imported"}},
				{"build", []string{"build", "-q", "-t", "built", ctx}, []string{"rmi", "built"}},
				{"commit", []string{"commit", "box", "committed"}, []string{"rmi", "committed"}},
				{"create", []string{"create", "--name", "second", "busybox"}, []string{"rm", "second"}},
				{"run", []string{"run", "--rm", "--network", "none", "busybox", "true"}, nil},
				{"tag", []string{"tag", "busybox", "other"}, []string{"rmi", "other"}},
			} {
				t.Run(op.name, func(t *testing.T) { s.sub(t).grow(op.name, op.args, op.undo) })
			}
		})
	}
}

func (s *small) sub(t *testing.T) *small {
	c := *s
	c.t = t
	return &c
}

// grow gives an action more and more room until it succeeds.
func (s *small) grow(name string, args, undo []string) {
	t := s.t
	failed := 0
	before := s.used()
	for _, kb := range []int64{0, 4, 16, 40, 400, 1500, 3200, 4000, 6000, 6700, 9000, 14000, 24000, 40000} {
		empty := s.fill(kb)
		out, err := s.try(args...)
		if err == nil {
			empty()
			if undo != nil {
				s.run(undo...)
			}
			s.run("builder", "prune", "-af")
			t.Logf("%s failed %d times, succeeds with %d kB", name, failed, kb)
			if failed == 0 && name != "run" && name != "tag" && name != "create" {
				t.Errorf("%s never found the disk full", name)
			}
			if after := s.used(); after > before+100<<10 {
				t.Errorf("after %s: %d bytes, before %d", name, after, before)
			}
			return
		}
		failed++
		var lines []string
		for _, l := range strings.Split(strings.TrimSpace(out), "\n") {
			if strings.HasPrefix(l, "conex: ") {
				lines = append(lines, l)
			}
		}
		if len(lines) != 1 || !strings.Contains(strings.ToLower(out), "no space left on device") || !strings.Contains(lines[0], "'conex system df' shows what takes it") {
			t.Errorf("%s with %d kB: %s", name, kb, out)
		}
		if kb >= 16 { // with less than that nothing at all can be done
			if out, err := s.try("images", "-q"); err != nil || strings.Count(out, "\n") != 1 {
				t.Errorf("images on the full disk: %v %s", err, out)
			}
		}
		empty()
		if out, err := s.try("system", "check"); err != nil {
			t.Errorf("%s with %d kB: the store is not clean: %v\n%s", name, kb, err, out)
		}
		if out, err := s.try("run", "--rm", "--network", "none", "busybox", "true"); err != nil {
			t.Errorf("%s with %d kB: an image does not run any more: %v\n%s", name, kb, err, out)
		}
		if out, err := s.try("start", "-a", "box"); err != nil {
			t.Errorf("%s with %d kB: a container does not start any more: %v\n%s", name, kb, err, out)
		}
		if name == "build" {
			s.run("builder", "prune", "-af") // a step whose program found the disk full leaves those before it in the cache
		}
		if after := s.used(); after > before+100<<10 {
			t.Errorf("%s with %d kB: %d bytes are used, %d were\n%s", name, kb, after, before, s.run("system", "df", "-v"))
			before = after
		}
	}
	t.Errorf("%s never succeeds", name)
}

// TestReadOnlyRoot has a root that can't be written any more: what only reads goes on, everything else says why it can't.
func TestReadOnlyRoot(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	busybox, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	s := newSmall(t, "ext4", 32<<20)
	s.run("import", "-c", `CMD ["true"]`, busybox, "busybox")
	s.run("create", "--name", "box", "busybox")
	if out, err := exec.Command("mount", "-o", "remount,ro", s.fs).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	for _, args := range [][]string{{"images"}, {"ps", "-a"}, {"inspect", "box"}, {"history", "busybox"}, {"system", "df", "-v"}} {
		s.run(args...)
	}
	for _, args := range [][]string{
		{"tag", "busybox", "other"}, {"import", busybox, "again"}, {"create", "busybox"}, {"rm", "box"}, {"rmi", "-f", "busybox"}, {"commit", "box"}, {"builder", "prune", "-af"},
		{"start", "box"}, {"run", "--rm", "busybox"}, {"system", "check"}, {"load", "-i", busybox},
	} {
		out, err := s.try(args...)
		if err == nil || strings.Count(out, "conex: ") != 1 || !strings.Contains(out, "read-only file system") || !strings.Contains(out, "is mounted read-only") {
			t.Errorf("%v: %v %s", args, err, out)
		}
	}
	if out, err := exec.Command("mount", "-o", "remount,rw", s.fs).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	s.run("start", "-a", "box")
	s.run("system", "check")
}

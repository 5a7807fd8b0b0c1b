package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	switch os.Getenv("DISK_TEST") {
	case "update": // adds to a counter, for TestUpdateAcrossProcesses
		for range 50 {
			err := Update(os.Args[1], 0o600, Volatile, func(old []byte) ([]byte, error) {
				n, _ := strconv.Atoi(string(old))
				return []byte(strconv.Itoa(n + 1)), nil
			})
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		os.Exit(0)
	case "stage": // makes a stage and dies without closing it
		r, err := OpenRoot(os.Args[1])
		if err != nil {
			panic(err)
		}
		s, err := r.Stage()
		if err != nil {
			panic(err)
		}
		fmt.Println(s.Dir)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(t *testing.T, what, arg string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(exe, arg)
	c.Env = append(os.Environ(), "DISK_TEST="+what)
	return c
}

func TestUpdateAcrossProcesses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counter")
	var wg sync.WaitGroup
	for range 4 {
		c := child(t, "update", path)
		wg.Go(func() {
			if out, err := c.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	wg.Wait()
	got, err := os.ReadFile(path)
	if err != nil || string(got) != "200" {
		t.Fatalf("counter is %s, %v", got, err)
	}
}

func TestUpdateKeepsOldOnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := WriteFile(path, []byte("old"), 0o640, Durable); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	if err := Update(path, 0o600, Durable, func([]byte) ([]byte, error) { return []byte("new"), boom }); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	got, _ := os.ReadFile(path)
	st, err := os.Stat(path)
	if string(got) != "old" || err != nil || st.Mode().Perm() != 0o640 {
		t.Fatalf("%s %v", got, st.Mode())
	}
}

func TestWriteFileLeavesNoTemporary(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "target"), 0o700); err != nil {
		t.Fatal(err)
	}
	err := WriteFile(filepath.Join(dir, "target"), []byte("x"), 0o600, Durable)
	if err == nil {
		t.Fatal("a folder was replaced by a file")
	}
	if n := strings.Count(err.Error(), "target"); n != 1 || strings.Contains(err.Error(), tempPrefix) {
		t.Errorf("the error does not name the file, once and alone: %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("left: %v %v", entries, err)
	}
}

func TestLocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "l")
	l, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := TryAcquire(path); !errors.Is(err, ErrLocked) {
		t.Fatalf("second lock: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if _, err := AcquireContext(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("lock with an ended context: %v", err)
	}
	l.Release()
	l.Release()
	l2, err := AcquireContext(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	l2.Release()
}

// Who waited for the lock of a folder that is removed gets the lock of the next folder of that name, the only one that others know of.
func TestRemoveLocked(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "c")
	path := filepath.Join(dir, "lock")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(l.File().Fd()), &st); err != nil {
		t.Fatal(err)
	}
	type result struct {
		l   *Lock
		err error
	}
	waiter := make(chan result)
	go func() {
		l, err := Acquire(path)
		waiter <- result{l, err}
	}()
	waits := fmt.Sprintf(":%d ", st.Ino) // as in "7: -> FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF"
	for deadline := time.Now().Add(10 * time.Second); ; {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(strings.Split(string(locks), "\n"), func(l string) bool { return strings.Contains(l, "->") && strings.Contains(l, waits) }) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody waits for the lock")
		}
	}
	if err := RemoveLocked(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l.Release()
	got := <-waiter
	if got.err != nil {
		t.Fatal(got.err)
	}
	defer got.l.Release()
	if _, err := TryAcquire(path); !errors.Is(err, ErrLocked) {
		t.Errorf("the waiter has a lock that nobody else knows of: %v", err)
	}
	if err := RemoveLocked(filepath.Join(top, "none")); err != nil {
		t.Errorf("no folder: %v", err)
	}

	// A remover that was killed half-way.
	if err := os.MkdirAll(filepath.Join(top, tempPrefix+"gone", "root"), 0o700); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(top)
	if err == nil {
		err = RemoveLeft(top, entries)
	}
	if err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(top, "*")); err != nil || !slices.Equal(left, []string{dir}) {
		t.Errorf("left: %v %v", left, err)
	}
	if left, err := filepath.Glob(filepath.Join(top, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v %v", left, err)
	}
}

func TestPublishOnce(t *testing.T) {
	r, err := OpenRoot(filepath.Join(t.TempDir(), "root"))
	if err != nil {
		t.Fatal(err)
	}
	var wins int
	for i := range 2 {
		s, err := r.Stage()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(s.Dir, "f"), fmt.Append(nil, i), 0o600); err != nil {
			t.Fatal(err)
		}
		won, err := s.Publish(r.Path("layers", "x"))
		if err != nil {
			t.Fatal(err)
		}
		if won {
			wins++
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(r.Path("layers", "x", "f"))
	if wins != 1 || err != nil || !bytes.Equal(got, []byte("0")) {
		t.Fatalf("%d wins, %s, %v", wins, got, err)
	}
	left, err := os.ReadDir(r.Path("staging"))
	if err != nil || len(left) != 0 {
		t.Fatalf("staging holds %v %v", left, err)
	}
}

func TestSweepTakesOnlyTheDead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	r, err := OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	out, err := child(t, "stage", dir).Output()
	if err != nil {
		t.Fatal(err)
	}
	dead := string(bytes.TrimSpace(out))
	if _, err := os.Stat(dead); err != nil {
		t.Fatal(err)
	}
	live, err := r.Stage()
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	if err := os.WriteFile(r.Path("containers", "c"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.TrashLater(r.Path("containers", "c")); err != nil {
		t.Fatal(err)
	}
	if err := r.Trash(r.Path("containers", "never-there")); err != nil {
		t.Fatal(err)
	}
	if err := r.Sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dead); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("dead stage is left: %v", err)
	}
	if _, err := os.Stat(live.Dir); err != nil {
		t.Errorf("live stage is gone: %v", err)
	}
	if left, _ := os.ReadDir(r.Path("trash")); len(left) != 0 {
		t.Errorf("trash holds %v", left)
	}
}

func TestOpenRootRefusesNewerLayout(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "version"), []byte("99\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenRoot(dir); err == nil {
		t.Fatal("opened")
	}
}

// TestRootIsRootsAlone is CVE-2021-41091: no user of the host reaches a set-user-id program in a container's folder.
func TestRootIsRootsAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	if _, err := OpenRoot(dir); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if i, err := e.Info(); err != nil || e.IsDir() && i.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", e.Name(), i.Mode(), err)
		}
	}
}

// TestMeter compares with du: sparse files, hard links, deep and wide folders, links.
func TestMeter(t *testing.T) {
	if err := exec.Command("du", "--version").Run(); err != nil {
		t.Skip("the du that is here is not GNU's, which alone goes down paths of any length: ", err)
	}
	dir := t.TempDir()
	// Longer than the kernel takes in one piece: made step by step.
	at, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		name := fmt.Sprintf("%0120d", i)
		if err := unix.Mkdirat(int(at.Fd()), name, 0o700); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Openat(int(at.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		at.Close()
		at = os.NewFile(uintptr(fd), name)
		f, err := unix.Openat(fd, "f", unix.O_CREAT|unix.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(f, make([]byte, 5000)); err != nil {
			t.Fatal(err)
		}
		unix.Close(f)
	}
	at.Close()
	for i := range 300 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file", i)), make([]byte, i*100), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "file299"), filepath.Join(dir, "again")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file1", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "sparse"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "sparse"), 1<<30); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("du", "-s", "--block-size=1", dir).Output()
	if err != nil {
		t.Fatal(err)
	}
	want, err := strconv.ParseInt(string(bytes.Fields(out)[0]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	var m Meter
	got, err := m.Tree(dir)
	if err != nil || got.Disk != want || got.Size != 1<<30+40*5000+100*299*300/2 || got.Files != 40+300+2 {
		t.Errorf("%+v, %v; du says %d", got, err, want)
	}
	if again, err := m.Tree(filepath.Join(dir, "again")); err != nil || again.Disk != 0 {
		t.Errorf("a file counted twice: %+v, %v", again, err)
	}
	if none, err := m.Tree(filepath.Join(dir, "none")); err != nil || none != (Space{}) {
		t.Errorf("%+v, %v", none, err)
	}
	if n, counted := FreeFiles(dir); counted && n == 0 {
		t.Error("no more files are possible where some were just made")
	}
	if n, counted := FreeFiles("/proc"); counted {
		t.Errorf("/proc counts its files: %d", n)
	}
	free, total, err := Free(dir)
	if err != nil || free <= 0 || total < free {
		t.Errorf("%d of %d free, %v", free, total, err)
	}
}

func TestOpenRootMendsFolders(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	if _, err := OpenRoot(dir); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"layers", "blobs"} {
		if err := os.RemoveAll(filepath.Join(dir, d)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OpenRoot(dir); err != nil {
		t.Fatal(err)
	}
	for _, d := range Folders {
		if fi, err := os.Lstat(filepath.Join(dir, d)); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", d, fi, err)
		}
	}
}

// TestRemoveTemps: what a killed writer left of a file goes, the file and those of others stay.
func TestRemoveTemps(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.json", ".tmp-a.json.1", ".tmp-a.json.22", ".tmp-ab.json.1", ".tmp-a.jso.1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := RemoveTemps(filepath.Join(dir, "a.json")); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := []string{".tmp-a.jso.1", ".tmp-ab.json.1", "a.json"}; !slices.Equal(left, want) {
		t.Errorf("left %q, want %q", left, want)
	}
	if err := RemoveTemps(filepath.Join(dir, "none", "a.json")); err != nil {
		t.Error(err)
	}
}

// TestReadAtMost: a file as long as the limit is read, a longer one refused, and a pipe is read to its end.
func TestReadAtMost(t *testing.T) {
	dir := t.TempDir()
	const limit = 10000
	for _, n := range []int{0, 1, 4095, 4096, 4097, limit, limit + 1} {
		path := filepath.Join(dir, "file")
		want := bytes.Repeat([]byte("x"), n)
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadAtMost(path, limit); (err == nil) != (n <= limit) || err == nil && !bytes.Equal(got, want) {
			t.Errorf("%d bytes: %d, %v", n, len(got), err)
		}
	}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(pipe, os.O_WRONLY, 0)
		for _, s := range []string{"ab", "cd"} {
			if err == nil {
				_, err = f.WriteString(s)
			}
		}
		errs <- errors.Join(err, f.Close())
	}()
	got, err := ReadAtMost(pipe, limit)
	if werr := <-errs; err != nil || werr != nil || string(got) != "abcd" {
		t.Errorf("%q, %v, %v", got, err, werr)
	}
}

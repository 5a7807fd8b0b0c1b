package build

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"conex/internal/image"
	"conex/internal/linux/mount"

	"github.com/moby/patternmatcher"
	"golang.org/x/sys/unix"
)

// soon fails the test if f does not come to an end.
func soon(t testing.TB, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		t.Fatal("it hangs")
	}
}

// refused builds what can't be built: one line, soon.
func (e *env) refused(file, want string, change ...func(*Request)) {
	e.t.Helper()
	soon(e.t, func() {
		_, err := e.build(file, change...)
		if err == nil || !strings.Contains(err.Error(), want) {
			e.t.Errorf("error %v, want %q", err, want)
			return
		}
		var se *StepError
		if errors.As(err, &se) {
			err = se.Err // without the Dockerfile's own words
		}
		if said := err.Error(); !utf8.ValidString(said) || strings.ContainsAny(said, "\x00\x1b\n") {
			e.t.Errorf("the reason is no line that a terminal should see: %q", said)
		}
	})
}

// TestHostileLinks: a link of the context leads to the context's own files, whatever it says.
func TestHostileLinks(t *testing.T) {
	e := newEnv(t)
	e.write("passwd", "->/etc/passwd")
	e.write("up", "->../../../../../../../../etc")
	e.write("loop", "->loop")
	e.write("etc/hostname", "mine")
	e.write("name", "->/etc/hostname")
	e.refused("FROM scratch\nCOPY passwd /", `"/passwd": not found`)
	e.refused("FROM scratch\nCOPY up/shadow /", `"/up/shadow": not found`)
	e.refused("FROM scratch\nCOPY loop /", "too many levels of symbolic links")
	img := e.must("FROM scratch\nCOPY name /a\nCOPY up /b\nCOPY . /c\n")
	e.wantTree(img, map[string]string{
		"a": "644 0:0 mine", "b": "755 0:0", "b/hostname": "644 0:0 mine", "c": "755 0:0", "c/passwd": "-> /etc/passwd", "c/etc": "755 0:0",
		"c/up": "-> ../../../../../../../../etc", "c/loop": "-> loop", "c/etc/hostname": "644 0:0 mine", "c/name": "-> /etc/hostname",
		"c/Dockerfile": "644 0:0 FROM scratch\nCOPY name /a\nCOPY up /b\nCOPY . /c\n",
	})
}

// TestHostileSwap swaps a folder for a link out of the context while it is copied: nothing of the outside may get into a layer.
func TestHostileSwap(t *testing.T) {
	e := newEnv(t)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		e.write(fmt.Sprintf("a/b/%d", i), "x")
	}
	dir, link := filepath.Join(e.ctx, "a/b"), filepath.Join(e.ctx, "link")
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	built := 0
	for i := range 40 {
		img, err := e.build(fmt.Sprintf("FROM scratch\nCOPY --exclude=%d a /a\nCOPY --exclude=%d a/b /b\n", i, i))
		if err != nil {
			continue // it was a link, or a file was gone: said in one line
		}
		built++
		for name, what := range e.tree(img) {
			if strings.HasSuffix(name, "secret") || strings.Contains(what, "secret") && !strings.HasPrefix(what, "->") {
				t.Errorf("%s: %s", name, what)
			}
		}
	}
	close(stop)
	swapper.Wait()
	t.Logf("%d of 40 builds went through", built)
}

// TestHostileFiles: what is no file is copied as what it is, or refused, and never waited for.
func TestHostileFiles(t *testing.T) {
	e := newEnv(t)
	at := func(name string) string { return filepath.Join(e.ctx, name) }
	e.write("d/file", "x")
	for name, mode := range map[string]uint32{"d/fifo": unix.S_IFIFO | 0o644, "d/null": unix.S_IFCHR | 0o666} {
		if err := unix.Mknod(at(name), mode, int(unix.Mkdev(1, 3))); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: at("d/sock")}); err != nil {
		t.Fatal(err)
	}
	var img image.Image
	soon(t, func() { img = e.must("FROM scratch\nCOPY d /d\n") })
	tree := e.tree(img)
	if _, ok := tree["d/sock"]; ok || tree["d/file"] != "644 0:0 x" || tree["d/fifo"] == "" || tree["d/null"] == "" {
		t.Errorf("%v", tree)
	}
	e.refused("FROM scratch\nCOPY d/sock /", "is a socket")
	soon(t, func() { e.must("FROM scratch\nADD d/fifo /x/\n") })

	// The files that the builder itself reads.
	for _, name := range []string{"Dockerfile", ".dockerignore", "Other.dockerignore"} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			e.write("Other", "FROM scratch\nCOPY . /\n")
			if err := unix.Mkfifo(filepath.Join(e.ctx, name), 0o644); err != nil {
				t.Fatal(err)
			}
			soon(t, func() {
				file := "Other"
				if name == "Dockerfile" {
					file = ""
				}
				_, err := e.request(t.Context(), Request{Context: e.ctx, Dockerfile: file})
				if err == nil || !strings.Contains(err.Error(), "not a") {
					t.Errorf("error %v", err)
				}
			})
		})
	}
	e = newEnv(t)
	e.write(".dockerignore", "->/etc/passwd")
	e.write("a", "A")
	e.wantTree(e.must("FROM scratch\nCOPY a /\n"), map[string]string{"a": "644 0:0 A"})
}

// TestUnreadable: a file that can't be read fails the build in one line. What root may not read either is a file of sysfs that can
// only be written.
func TestUnreadable(t *testing.T) {
	found, err := filepath.Glob("/sys/bus/*/drivers_probe")
	if err != nil || len(found) == 0 {
		t.Skip("this kernel has no file that root can't read")
	}
	e := newEnv(t)
	e.write("d/probe", "")
	at := filepath.Join(e.ctx, "d/probe")
	if err := unix.Mount(found[0], at, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("bind mount: %v", err)
	}
	defer unix.Unmount(at, unix.MNT_DETACH)
	e.refused("FROM scratch\nCOPY d /\n", `read "/d/probe": `)
	e.refused("FROM scratch\nCOPY d/probe /\n", "permission denied")
}

// sizes are those of an image's files.
func (e *env) sizes(img image.Image) map[string]int64 {
	e.t.Helper()
	lower, err := e.b.Layers.Lower(e.t.Context(), img.Layers())
	if err != nil {
		e.t.Fatal(err)
	}
	root, err := mount.Overlay(mount.OverlayOptions{Lower: lower})
	if err != nil {
		e.t.Fatal(err)
	}
	defer root.Close()
	sel, err := (&view{root: root}).selection(e.t.Context(), []string{"/"}, selectOptions{})
	if err != nil {
		e.t.Fatal(err)
	}
	out := map[string]int64{}
	for _, it := range sel[0].items {
		out[it.rel] = it.st.Size
	}
	return out
}

// TestChanging: files that change, shrink, grow or go while they are copied end in a layer that a later build does not take for the
// files', or in one line that says which.
func TestChanging(t *testing.T) {
	e := newEnv(t)
	const files, size = 20, 1 << 20
	at := func(i int) string { return filepath.Join(e.ctx, "d", fmt.Sprint(i)) }
	fill := func() {
		for i := range files {
			e.write(fmt.Sprintf("d/%d", i), strings.Repeat("a", size))
		}
	}
	for name, change := range map[string]func(p string) error{
		"grow":   func(p string) error { return os.Truncate(p, 2*size) },
		"shrink": func(p string) error { return os.Truncate(p, 10) },
		"vanish": func(p string) error { return errors.Join(os.Remove(p), os.WriteFile(p, nil, 0o644)) },
		"pipe":   func(p string) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o644)) },
	} {
		t.Run(name, func(t *testing.T) {
			for round := range 5 {
				fill()
				stop := make(chan struct{})
				var changer sync.WaitGroup
				changer.Go(func() {
					for i := range files * 3 {
						select {
						case <-stop:
							return
						default:
							_ = change(at(files - 1 - i%files))
						}
					}
				})
				soon(t, func() {
					_, err := e.build(fmt.Sprintf("FROM scratch\nCOPY d /%s%d\n", name, round))
					var se *StepError
					if errors.As(err, &se) && !strings.Contains(se.Err.Error(), "d/") && !strings.Contains(se.Err.Error(), name) {
						t.Errorf("%v names no file", err)
					}
				})
				close(stop)
				changer.Wait()
				if name == "pipe" {
					if err := os.RemoveAll(filepath.Join(e.ctx, "d")); err != nil {
						t.Fatal(err)
					}
					fill()
				}
				// What is there now is what the next build gives.
				img, err := e.build(fmt.Sprintf("FROM scratch\nCOPY d /%s%d\n", name, round))
				if err != nil {
					t.Fatal(err)
				}
				sizes := e.sizes(img)
				for i := range files {
					st, err := os.Stat(at(i))
					if err != nil {
						t.Fatal(err)
					}
					if got := sizes[fmt.Sprintf("%s%d/%d", name, round, i)]; got != st.Size() {
						t.Errorf("%d: %d bytes in the image, %d in the context", i, got, st.Size())
					}
				}
			}
		})
	}
}

// TestStrangeNames: names are bytes, and a layer has the very same.
func TestStrangeNames(t *testing.T) {
	e := newEnv(t)
	names := []string{"a\nb", "\xff\xfe", "tab\there", "\x1b[31mred", "q\"uote", "back\\slash", " space ", "-dash", "ü", "\u202eright", strings.Repeat("n", 255), "*", "[a]"}
	want := map[string]string{"d": "755 0:0"}
	for _, n := range names {
		e.write("d/"+n, "x")
		want["d/"+n] = "644 0:0 x"
	}
	e.wantTree(e.must("FROM scratch\nCOPY d /d\n"), want)
	e.wantTree(e.must("FROM scratch AS a\nCOPY d /d\nFROM scratch\nCOPY --from=a /d /d\n"), want)
	e.refused("FROM scratch\nCOPY d/\x1bc\xff /\n", `"/d/\x1bc\xff": not found`)
}

// TestDeep: folders in folders, beyond what one path can name.
func TestDeep(t *testing.T) {
	for _, depth := range []int{900, 3000} {
		e := newEnv(t)
		fd, err := unix.Open(e.ctx, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		for range depth {
			if err := unix.Mkdirat(fd, "d", 0o755); err != nil {
				t.Fatal(err)
			}
			next, err := unix.Openat(fd, "d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
			unix.Close(fd)
			if err != nil {
				t.Fatal(err)
			}
			fd = next
		}
		f, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(f)
		unix.Close(fd)
		soon(t, func() {
			_, err := e.build("FROM scratch\nCOPY d /x\n")
			switch {
			case depth*2 < unix.PathMax-100 && err != nil:
				t.Errorf("%d folders: %v", depth, err)
			case err != nil && !strings.Contains(err.Error(), "name too long"):
				t.Errorf("%d folders: %v", depth, err)
			}
		})
	}
}

func TestHostileIgnore(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	refused := func(text, want string) {
		t.Helper()
		e.write(".dockerignore", text)
		e.refused("FROM scratch\nCOPY . /\n", want)
	}
	refused(strings.Repeat("x\n", maxPatterns+1), ".dockerignore: 100001 patterns, at most 100000 are taken")
	refused(strings.Repeat("x", 20<<20), ".dockerignore")
	refused(strings.Repeat("a*", 20_000), ".dockerignore: a pattern of 40000 bytes")
	refused(strings.Repeat(strings.Repeat("a*", 2000)+"\n", 100), ".dockerignore: 400000 bytes of patterns with wildcards")
	refused("[", ".dockerignore: ")
	refused("!\n", ".dockerignore: ")
	// Many names, and expressions that take a backtracking matcher ages.
	var b strings.Builder
	for i := range maxPatterns - 100 {
		fmt.Fprintf(&b, "dir%d/file%d\n", i%100, i)
	}
	for range 20 {
		b.WriteString(strings.Repeat("a*", 100) + "b\n")
	}
	e.write(".dockerignore", b.String())
	for i := range 50 {
		e.write(fmt.Sprintf("%s%d", strings.Repeat("a", 200), i), "x")
	}
	soon(t, func() {
		if n := len(e.tree(e.must("FROM scratch\nCOPY . /\n"))); n != 53 { // Dockerfile, .dockerignore and a as well
			t.Errorf("%d files", n)
		}
	})
}

// FuzzIgnore holds the matcher with its map equal to patternmatcher, for names below folders that are not ignored.
func FuzzIgnore(f *testing.F) {
	for _, s := range [][2]string{
		{"a\nb/c", "b/c/d"}, {"*\n!a", "a"}, {"**/x", "a/x/b"}, {" a \n/b\nc/", "c/d"}, {"a\\b\n[a-", "a"}, {"!x", "x"}, {".\n..", "a"}, {"a//b/../c", "a/c"},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, text, name string) {
		patterns := strings.Split(text, "\n")
		if checkPatterns(patterns) != nil || len(text) > 2000 || len(name) > 200 {
			return
		}
		want, err := patternmatcher.New(patterns)
		got, gerr := newIgnoreMatcher(patterns)
		if (err == nil) != (gerr == nil) {
			t.Fatalf("%q: %v, %v", text, err, gerr)
		}
		if err != nil {
			return
		}
		name = strings.Trim(filepath.Clean("/"+name), "/")
		var winfo, ginfo patternmatcher.MatchInfo
		for at := range name + "/" {
			if at < len(name) && name[at] != '/' {
				continue
			}
			part := name[:at]
			if part == "" {
				return
			}
			var w, g bool
			w, winfo, err = want.MatchesUsingParentResults(part, winfo)
			g, ginfo, gerr = got.MatchesUsingParentResults(part, ginfo)
			if err != nil || gerr != nil {
				if (err == nil) != (gerr == nil) {
					t.Fatalf("%q, %q: %v, %v", text, part, err, gerr)
				}
				return
			}
			if w != g {
				t.Fatalf("%q, %q: %t, want %t", text, part, g, w)
			}
			w, _ = want.MatchesOrParentMatches(part)
			if g, _ := got.MatchesOrParentMatches(part); w != g {
				t.Fatalf("%q, %q with parents: %t, want %t", text, part, g, w)
			}
			if w && !got.Exclusions() {
				return // nothing below is asked for
			}
		}
	})
}

package mount

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

func folders(t *testing.T) (lower [2]string, upper, work string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	mk := func(name string) string {
		p := filepath.Join(dir, name)
		if err := os.Mkdir(p, 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	lower = [2]string{mk("top"), mk("bottom:with,odd\\name")}
	for i, l := range lower {
		if err := os.WriteFile(filepath.Join(l, "both"), []byte{"tb"[i]}, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(lower[1], "low"), []byte("low"), 0o644); err != nil {
		t.Fatal(err)
	}
	return lower, mk("upper"), mk("work")
}

func read(t *testing.T, root *os.File, name string) string {
	t.Helper()
	f, err := safepath.Open(root, name, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestOverlay holds the new mount API and the old option string to the same behaviour.
func TestOverlay(t *testing.T) {
	for name, mk := range map[string]func(OverlayOptions) (*os.File, error){
		"new":     Overlay,
		"classic": func(o OverlayOptions) (*os.File, error) { return overlayClassic(o, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			lower, upper, work := folders(t)
			m, err := mk(OverlayOptions{Lower: lower[:], Upper: upper, Work: work, Volatile: true})
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, m, "both") + read(t, m, "low"); got != "tlow" {
				t.Errorf("read %q", got)
			}
			f, err := safepath.Open(m, "new", unix.O_CREAT|unix.O_WRONLY, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			if _, err := os.Stat(filepath.Join(upper, "new")); err != nil {
				t.Errorf("upper: %v", err)
			}
			m.Close()
			mounts, err := os.ReadFile("/proc/self/mounts")
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(mounts), upper) {
				t.Error("the mount is left")
			}
		})
	}
}

func TestReadOnlyOverlays(t *testing.T) {
	lower, _, _ := folders(t)
	for n := 1; n <= 2; n++ {
		m, err := Overlay(OverlayOptions{Lower: lower[:n]})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := safepath.Open(m, "new", unix.O_CREAT|unix.O_WRONLY, 0o600); err == nil {
			t.Errorf("%d layers: written to", n)
		}
		if got := read(t, m, "both"); got != "t" {
			t.Errorf("%d layers: read %q", n, got)
		}
		m.Close()
	}
}

func TestErrorsSayWhy(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := New("tmpfs", []Param{{Key: "size", Value: "banana"}}, 0); err == nil {
		t.Error("tmpfs of size banana")
	} else {
		t.Log(err)
	}
	if _, err := Overlay(OverlayOptions{}); err == nil {
		t.Error("overlay of nothing")
	}
	if _, err := Clone(unix.AT_FDCWD, "/no/such", false); !os.IsNotExist(err) {
		t.Errorf("clone: %v", err)
	}
}

func TestReadOnlySelf(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if os.Getenv("MOUNT_TEST_SELF") != "" { // the child
		// Opening it for writing says "text file busy" while it runs; what counts is what comes after that.
		var st unix.Statfs_t
		if err := unix.Statfs("/proc/self/exe", &st); err != nil || st.Flags&unix.ST_RDONLY == 0 {
			t.Fatalf("the program can be written to: flags %x, %v", st.Flags, err)
		}
		// The parent forbids it once it hears from us, and then closes our input.
		fmt.Println("up")
		if _, err := io.ReadAll(os.Stdin); err != nil {
			t.Fatal(err)
		}
		if err := exec.Command("/proc/self/exe", "-test.run=^$").Run(); !errors.Is(err, unix.EACCES) {
			t.Fatalf("the program can be executed again: %v", err)
		}
		return
	}
	self, err := ReadOnlySelf()
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	c := exec.Command(fmt.Sprintf("/proc/self/fd/%d", self.Fd()), "-test.run=^TestReadOnlySelf$", "-test.v")
	c.Env = append(os.Environ(), "MOUNT_TEST_SELF=1")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// Not before the child runs: until the kernel has mapped the program, forbidding its execution kills it.
	var out strings.Builder
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		fmt.Fprintln(&out, lines.Text())
		if lines.Text() == "up" {
			if err := ForbidExecution(self); err != nil {
				t.Error(err)
			}
			in.Close()
		}
	}
	if err := c.Wait(); err != nil || !strings.Contains(out.String(), "PASS: TestReadOnlySelf") {
		t.Fatalf("%v: %s", err, out.String())
	}
}

func BenchmarkReadOnlySelf(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("needs root")
	}
	for b.Loop() {
		f, err := ReadOnlySelf()
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}

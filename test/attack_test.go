package test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Each test here plays a hostile image or container against the command line, with a program that fights for its attack as long as the
// test lasts. docs/SECURITY.md has the table of attacks and tests.

// attackWorld is a world with an image "hostile": busybox and test/attacker.
func attackWorld(t *testing.T) *world {
	t.Helper()
	w := limitsWorld(t)
	bin, err := attackerOnce()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	fixture, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	base, err := os.ReadFile(fixture)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range []struct {
		name, link string
		mode       int64
		content    []byte
	}{{"attacker", "", 0o755, raw}, {"evil", "/proc/self/exe", 0o777, nil}, {"suid", "", 0o4755, raw}} {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Size: int64(len(f.content)), ModTime: time.Unix(1700000000, 0)}
		if f.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(f.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	// A tar ends with two blocks of zeros, behind which nothing is read: ours comes first, without them.
	all := append(buf.Bytes()[:buf.Len()-1024], base...)
	w.conex("import", "-c", `CMD ["sh"]`, filepath.Join(w.write("hostile.tar", string(all)), "hostile.tar"), "hostile")
	return w
}

var attackerOnce = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "conex-attacker.")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir, "conex/test/attacker")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return filepath.Join(dir, "attacker"), nil
})

// attack runs the container name with the attacker and waits until it is at work.
func (w *world) attack(name string, args ...string) {
	w.t.Helper()
	w.conex(append([]string{"run", "-d", "--name", name, "--network", "none"}, args...)...)
	w.eventually(name+" at work", func() bool { return strings.Contains(w.try("logs", name).stdout, "ready") })
}

func fileDigest(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// TestAttackOnTheProgram is CVE-2019-5736 and the first part of CVE-2024-21626: whatever of conex enters a container is looked at, and
// written to, by a process that waits for it there.
func TestAttackOnTheProgram(t *testing.T) {
	w := attackWorld(t)
	before := fileDigest(t, w.bin)
	for _, caps := range [][]string{nil, {"--cap-add", "SYS_PTRACE", "--security-opt", "seccomp=unconfined"}} {
		w.attack("exe", append(caps, "hostile", "/attacker", "exe", "overwritten")...)
		for range 25 {
			w.conex("exec", "exe", "true")
			w.conex("debug", "--image", "busybox", "exe", "true")
			w.conex("cp", "exe:/etc/passwd", "-")
			if r := w.try("exec", "exe", "/evil"); r.code == 0 {
				t.Error("conex executed itself")
			}
		}
		if log := w.conex("logs", "exe"); log != "ready" {
			t.Errorf("caps %v: %s", caps, log)
		}
		w.conex("rm", "-f", "exe")
	}
	if fileDigest(t, w.bin) != before {
		t.Fatal("the program was overwritten")
	}
	w.attack("fds", "hostile", "/attacker", "fds")
	for range 50 {
		w.conex("exec", "fds", "true")
		for _, dir := range []string{"/proc/self/fd/3", "/proc/self/fd/7", "/proc/self/fd/9"} {
			if r := w.try("exec", "-w", dir, "fds", "true"); r.code == 0 {
				t.Errorf("a command began in %s", dir)
			}
		}
	}
	if log := w.conex("logs", "fds"); log != "ready" {
		t.Error(log)
	}
}

// TestAttackOnCopies is CVE-2018-15664 through the command: the container swaps folders and files for links to the host's.
func TestAttackOnCopies(t *testing.T) {
	w := attackWorld(t)
	host := filepath.Join(w.dir, "host")
	if err := os.MkdirAll(host+"/in", 0o755); err != nil {
		t.Fatal(err)
	}
	w.write("host/secret", "secret of the host")
	w.write("src/d/secret", "from outside")
	w.conex("run", "--name", "make", "--network", "none", "hostile", "sh", "-c", "mkdir -p /w/d/in && echo public >/w/d/secret && ln -s "+host+" /w/x && echo public >/w/f && ln -s "+host+"/secret /w/y && mknod /w/null c 1 3")
	w.conex("commit", "make", "swapping")
	w.attack("swap", "swapping", "/attacker", "swap", "/w/d", "/w/x", "/w/f", "/w/y")
	for i := range 60 {
		out := filepath.Join(w.dir, fmt.Sprintf("out%d", i))
		w.conex("cp", "swap:/w", out)
		w.try("cp", "-L", "swap:/w/d/secret", out+"/l1") // may find nothing
		w.try("cp", "-L", "swap:/w/f", out+"/l2")
		err := filepath.WalkDir(out, func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(p)
			if strings.Contains(string(b), "host") {
				t.Errorf("%s holds the host's secret", p)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if r := w.try("cp", "swap:/w", "-"); strings.Contains(r.stdout, "secret of the host") {
			t.Error("the tar holds the host's secret")
		}
		w.try("cp", "src/d", "swap:/w")
		w.try("cp", "src/d/secret", "swap:/w/d/in/secret")
		w.try("cp", "src/d/secret", "swap:/w/f")
		if err := os.RemoveAll(out); err != nil {
			t.Fatal(err)
		}
	}
	w.conex("diff", "swap")
	if b, err := os.ReadFile(host + "/secret"); err != nil || string(b) != "secret of the host" {
		t.Errorf("the host's file is now %q, %v", b, err)
	}
	if names, err := os.ReadDir(host + "/in"); err != nil || len(names) > 0 {
		t.Errorf("there is something on the host: %v, %v", names, err)
	}
}

// TestAttackOnMounts is CVE-2021-30465 and CVE-2023-27561: one container swaps a folder of a volume for a link while others are started
// that mount below it.
func TestAttackOnMounts(t *testing.T) {
	w := attackWorld(t)
	target := filepath.Join(w.dir, "target") // as the link has it, on the host
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	w.conex("run", "--rm", "--network", "none", "-v", "shared:/v", "busybox", "sh", "-c", "mkdir -p /v/d/sub /v/e && ln -s "+target+" /v/x && ln -s /proc /v/p")
	w.attack("swap", "-v", "shared:/v", "hostile", "/attacker", "swap", "/v/d", "/v/x", "/v/e", "/v/p")
	data := filepath.Join(w.write("data/marker", "marker"), "data")
	ran := 0
	for range 30 {
		r := w.try("run", "--rm", "--network", "none", "-v", "shared:/v", "-v", data+":/v/d/sub", "-v", data+":/v/e/sys",
			"busybox", "sh", "-c", "cat /proc/version >/dev/null && test ! -e /proc/sys/marker && grep -c . /proc/self/mountinfo")
		if r.code != 0 && r.code != 125 && r.code != 126 {
			t.Errorf("exit code %d: %s%s", r.code, r.stdout, r.stderr)
		}
		if r.code == 0 {
			ran++
		}
		if names, err := os.ReadDir(target); err != nil || len(names) > 0 {
			t.Fatalf("something was made or mounted on the host: %v, %v", names, err)
		}
	}
	if ran == 0 {
		t.Error("no container came to run: nothing was tried")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), target) {
		t.Errorf("a mount is on the host: %v", err)
	}
	w.conex("rm", "-f", "swap")
	// The same through the image: links where conex mounts, and where it masks.
	for _, link := range []string{"/proc", "/sys", "/dev"} {
		w.conex("import", "-c", `CMD ["sh"]`, linkTar(t, w, link), "links")
		if r := w.try("run", "--rm", "--network", "none", "links", "/x/busybox", "true"); r.code != 125 || !strings.Contains(r.stderr, link) {
			t.Errorf("%s is a link: exit code %d, %s", link, r.code, r.stderr)
		}
	}
}

// linkTar is a tar of busybox in which path is a link.
func linkTar(t *testing.T, w *world, path string) string {
	t.Helper()
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, err := range []error{
		tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "x/busybox", Mode: 0o755, Size: int64(len(b))}), func() error { _, err := tw.Write(b); return err }(),
		tw.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(path, "/"), Linkname: "/x", Mode: 0o777}), tw.Close(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	name := "link" + strings.ReplaceAll(path, "/", "-") + ".tar"
	return filepath.Join(w.write(name, buf.String()), name)
}

// TestSetUserID: without no-new-privileges a set-user-ID program is root's, with it nobody's, in execs too.
func TestSetUserID(t *testing.T) {
	w := attackWorld(t)
	const root, nobody, nothing = "Uid:\t65534\t0\t0\t0\n", "Uid:\t65534\t65534\t65534\t65534\n", "CapEff:\t0000000000000000"
	if got := w.conex("run", "--rm", "--network", "none", "-u", "nobody", "hostile", "/suid", "ids"); !strings.HasPrefix(got, root) {
		t.Errorf("without: %q", got)
	}
	args := []string{"--network", "none", "-u", "nobody", "--security-opt", "no-new-privileges", "hostile"}
	if got := w.conex(append(append([]string{"run", "--rm"}, args...), "/suid", "ids")...); got != nobody+nothing {
		t.Errorf("with: %q", got)
	}
	w.conex(append(append([]string{"run", "-d", "--name", "nnp"}, args...), "sleep", "1000")...)
	if got := w.conex("exec", "nnp", "/suid", "ids"); got != nobody+nothing {
		t.Errorf("exec: %q", got)
	}
	// A copy on the host has lost the bit.
	w.conex("cp", "nnp:/suid", "suid")
	if st, err := os.Stat(filepath.Join(w.dir, "suid")); err != nil || st.Mode()&os.ModeSetuid != 0 {
		t.Errorf("on the host: %v, %v", st.Mode(), err)
	}
}

// TestForkBomb: at the pids limit a bomb is a container like another.
func TestForkBomb(t *testing.T) {
	w := attackWorld(t)
	w.attack("bomb", "--pids-limit", "60", "hostile", "/attacker", "fork")
	w.attack("other", "hostile", "sh", "-c", "echo ready; exec sleep 1000")
	w.eventually("the bomb at its limit", func() bool { return len(strings.Split(w.try("top", "bomb").stdout, "\n")) > 20 })
	if n := len(strings.Split(w.conex("top", "bomb"), "\n")) - 1; n > 60 {
		t.Errorf("%d processes", n)
	}
	w.conex("exec", "other", "true")
	w.conex("cp", "bomb:/etc/passwd", "-")
	w.conex("diff", "bomb")
	w.conex("kill", "bomb")
	w.conex("rm", "bomb")
}

// TestLogFlood: what a container writes is bounded on the disk, and it is ended while it writes.
func TestLogFlood(t *testing.T) {
	w := attackWorld(t)
	for _, driver := range []string{"json-file", "local"} {
		id := w.conex("run", "-d", "--name", "flood", "--network", "none", "--log-driver", driver, "--log-opt", "max-size=1m", "--log-opt", "max-file=3", "hostile", "/attacker", "flood")
		dir := filepath.Join(w.root, "containers", id, "log")
		turned := func() bool { return len(w.try("logs", "--tail", "1", "flood").stdout) > 0 && size(dir) > 1<<20 }
		w.eventually("a flood", turned)
		for range 20 {
			if n := size(dir); n > 5<<20 {
				t.Fatalf("%s: the log has %d bytes", driver, n)
			}
			w.conex("ps", "-q")
		}
		w.conex("rm", "-f", "flood")
	}
}

// size is what the files in a folder have together; they come and go.
func size(dir string) int64 {
	names, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	var n int64
	for _, e := range names {
		if st, err := e.Info(); err == nil {
			n += st.Size()
		} else if !errors.Is(err, fs.ErrNotExist) {
			return 0
		}
	}
	return n
}

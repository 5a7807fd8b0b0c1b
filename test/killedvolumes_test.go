package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// volumeFiles is how many files the volumes of TestVolumesKilledAtRandom have, besides the one that counts them.
const volumeFiles = 200

// volumeKilling is one kind of round: what is there before, the command that is killed, and which of the volumes may be gone, or be there, after.
type volumeKilling struct {
	name   string
	before [][]string
	cmd    []string
	// may are volumes (VOLUME or VOLUME@SNAPSHOT) that may be there or not. If they are, they are whole.
	may []string
	// one says that exactly one of may is there.
	one bool
	// letters are what the files of "data" may say, all of them the same.
	letters string
}

func volumeKillings(archive string) []volumeKilling {
	use := []string{"create", "--name", "victim", "--network", "none", "-v", "fresh:/data", "filled", "true"}
	return []volumeKilling{
		{"create", nil, []string{"volume", "create", "--label", "a=b", "plain"}, nil, false, "A"},
		{"first use", nil, use, []string{"fresh"}, false, "A"},
		{"first use of an empty one", [][]string{{"volume", "create", "fresh"}}, use, nil, false, "A"},
		{"snapshot", nil, []string{"volume", "snapshot", "data", "snap"}, []string{"data@snap"}, false, "A"},
		{"clone", nil, []string{"volume", "clone", "data", "copy"}, []string{"copy"}, false, "A"},
		{"restore", nil, []string{"volume", "restore", "data@b"}, nil, false, "AB"},
		{"restore --keep", nil, []string{"volume", "restore", "--keep", "kept", "data@b"}, []string{"data@kept"}, false, "AB"},
		{"import", nil, []string{"volume", "import", "--replace", "data", archive}, nil, false, "AB"},
		{"import --keep", nil, []string{"volume", "import", "--keep", "kept", "data", archive}, []string{"data@kept"}, false, "AB"},
		{"import of a new one", nil, []string{"volume", "import", "new", archive}, []string{"new"}, false, "A"},
		{"rename", nil, []string{"volume", "rename", "data", "renamed"}, []string{"data", "renamed"}, true, "A"},
		{"rm", [][]string{{"volume", "clone", "data", "copy"}}, []string{"volume", "rm", "copy"}, []string{"copy"}, false, "A"},
		{"rm of a snapshot", [][]string{{"volume", "snapshot", "data", "snap"}}, []string{"volume", "rm", "data@snap"}, []string{"data@snap"}, false, "A"},
		{"prune", [][]string{{"volume", "clone", "data", "copy"}}, []string{"volume", "prune", "-af"}, []string{"copy"}, false, "A"},
	}
}

// TestVolumesKilledAtRandom kills volume commands at a moment within their time. No volume or snapshot is ever there in part, what
// "data" holds is always one of its two contents, and the next command of the same kind works. CONEX_KILLS and CONEX_SEED are as in
// TestKilledAtRandom.
func TestVolumesKilledAtRandom(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("CONEX_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("CONEX_SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	fill := func(letter string) string {
		return fmt.Sprintf(`mkdir -p /data/d; i=0; while [ $i -lt %d ]; do echo %s >/data/d/$i; i=$((i+1)); done; echo %s >/data/whole`, volumeFiles-1, letter, letter)
	}
	w.conex("run", "--name", "base", "--network", "none", "busybox", "sh", "-c", fill("A"))
	w.conex("commit", "base", "filled")
	w.conex("rm", "base")
	w.conex("run", "--rm", "--network", "none", "-v", "data:/data", "busybox", "sh", "-c", fill("B"))
	w.conex("volume", "snapshot", "data", "b")
	archive := filepath.Join(w.dir, "b.tar")
	w.conex("volume", "export", "-o", archive, "data")
	w.conex("run", "--rm", "--network", "none", "-v", "data:/data", "busybox", "sh", "-c", fill("A"))
	w.conex("volume", "snapshot", "data", "a")

	took := map[string]time.Duration{}
	ks := volumeKillings(archive)
	rounds := len(ks)
	if os.Getenv("CONEX_KILLS") != "" {
		rounds = kills(t)
	}
	for i := range rounds {
		k := ks[i%len(ks)]
		if took[k.name] == 0 {
			w.prepareVolumes(k.before)
			took[k.name] = w.try(k.cmd...).took
			w.clearVolumes()
		}
		moment := time.Duration(rnd.Float64() * 1.2 * float64(took[k.name]))
		what := fmt.Sprintf("round %d: volume %s killed after %v of %v", i, k.name, moment, took[k.name])
		w.prepareVolumes(k.before)
		cmd := w.command(k.cmd...)
		w.start(cmd)
		for began := time.Now(); time.Since(began) < moment; { // a sleep would round the moment
		}
		kill9(t, cmd.Process.Pid)
		w.waitFor(cmd, what)
		w.checkVolumes(&k, what)
		// Again, undisturbed, and what it left is gone.
		if r := w.try(k.cmd...); r.code != 0 && !strings.Contains(r.stderr, "exists already") && !strings.Contains(r.stderr, "no such volume") &&
			!strings.Contains(r.stderr, "has no snapshot") && !strings.Contains(r.stderr, "already in use") && !strings.Contains(r.stderr, "the volume has data") {
			t.Errorf("%s: the next one ends with %d: %s", what, r.code, r.stderr)
		}
		if strings.HasPrefix(k.name, "first use") {
			if got := w.wholeVolume("fresh"); got != "A" {
				t.Errorf("%s: the copy of first use is %q", what, got)
			}
		}
		w.clearVolumes()
		if t.Failed() {
			return
		}
	}
	w.conex("volume", "snapshot", "data", "last") // which sweeps
	for _, dir := range []string{"staging", "trash"} {
		if left, err := os.ReadDir(filepath.Join(w.root, dir)); err != nil || len(left) > 0 {
			t.Errorf("%s has %v, %v", dir, left, err)
		}
	}
	w.conex("volume", "rm", "--snapshots", "data")
}

func (w *world) prepareVolumes(before [][]string) {
	w.t.Helper()
	for _, args := range before {
		w.conex(args...)
	}
}

// clearVolumes brings the volumes back to data, with A and the snapshots a and b.
func (w *world) clearVolumes() {
	w.t.Helper()
	w.clear()
	for _, name := range strings.Fields(w.conex("volume", "ls", "-q")) {
		if name == "renamed" {
			w.conex("volume", "rename", "renamed", "data")
		} else if name != "data" {
			w.conex("volume", "rm", name)
		}
	}
	for _, name := range strings.Fields(w.conex("volume", "snapshots", "-q")) {
		if name != "data@a" && name != "data@b" {
			w.conex("volume", "rm", name)
		}
	}
	if w.wholeVolume("data") != "A" {
		w.conex("volume", "restore", "data@a")
	}
}

// wholeVolume is the letter that all files of a volume or snapshot say; "" when there is none, or what is wrong with it.
func (w *world) wholeVolume(name string) string {
	vol, snapshot, _ := strings.Cut(name, "@")
	dir := filepath.Join(w.root, "volumes", vol)
	if snapshot != "" {
		dir = filepath.Join(dir, "snapshots", snapshot)
	}
	if _, err := os.Lstat(filepath.Join(dir, "meta.json")); err != nil {
		if _, err := os.Lstat(dir); err == nil {
			return "a folder without a record"
		}
		return ""
	}
	letters := map[string]int{}
	err := filepath.WalkDir(filepath.Join(dir, "_data"), func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		letters[strings.TrimSpace(string(b))]++
		return err
	})
	if err != nil {
		return err.Error()
	}
	for l, n := range letters {
		if len(letters) == 1 && n == volumeFiles {
			return l
		}
	}
	return fmt.Sprintf("files by what they say: %v", letters)
}

func (w *world) checkVolumes(k *volumeKilling, what string) {
	w.t.Helper()
	there := 0
	for _, name := range k.may {
		got := w.wholeVolume(name)
		if got != "" {
			there++
		}
		if got != "" && got != "A" && got != "B" {
			w.t.Errorf("%s: %s is there in part: %s", what, name, got)
		}
	}
	if k.one && there != 1 {
		w.t.Errorf("%s: of %v there are %d", what, k.may, there)
	}
	if k.one {
		return
	}
	if got := w.wholeVolume("data"); len(got) != 1 || !strings.Contains(k.letters, got) {
		w.t.Errorf("%s: data is %q", what, got)
	}
	for name, letter := range map[string]string{"data@a": "A", "data@b": "B"} {
		if got := w.wholeVolume(name); got != letter {
			w.t.Errorf("%s: %s is %q", what, name, got)
		}
	}
	if strings.Contains(k.name, "--keep") && w.wholeVolume("data") == "B" {
		if got := w.wholeVolume("data@kept"); got != "A" {
			w.t.Errorf("%s: what was there is lost: the snapshot is %q", what, got)
		}
	}
}

// TestVolumeUsersKilled kills the monitors of containers that share a volume which is mounted for them: the next command finds the mount if
// nobody is left, and nothing of it before.
func TestVolumeUsersKilled(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	w.conex("volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "mem")
	at := filepath.Join(w.state, "volumes", "mem")
	mounted := func() bool {
		var st unix.Statx_t
		return unix.Statx(unix.AT_FDCWD, at, 0, 0, &st) == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
	}
	for i := range 3 {
		first := w.conex("run", "-d", "--network", "none", "-v", "mem:/m", "busybox", "sh", "-c", "echo kept >/m/f; sleep 1000")
		second := w.conex("run", "-d", "--network", "none", "-v", "mem:/m", "busybox", "sleep", "1000")
		kill9(t, w.monitorOf(first))
		w.eventually("the first is settled", func() bool {
			return strings.Contains(w.conex("ps", "-a", "--no-trunc", "--filter", "id="+first), "Exited")
		})
		if !mounted() {
			t.Fatalf("round %d: unmounted under the second", i)
		}
		if got := w.conex("exec", second, "cat", "/m/f"); got != "kept" {
			t.Fatalf("round %d: %q", i, got)
		}
		kill9(t, w.monitorOf(second))
		w.eventually("the volume is unmounted", func() bool { w.conex("ps"); return !mounted() })
		w.conex("rm", first, second)
	}
	w.conex("volume", "rm", "mem")
}

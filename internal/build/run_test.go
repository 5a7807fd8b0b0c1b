package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/runtime"
)

func TestRunForms(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	for _, c := range []struct{ name, file, out string }{
		{"shell form", `RUN echo "a  b" $HOME`, "a  b /root\n"},
		{"exec form", `RUN ["echo", "$HOME"]`, "$HOME\n"},
		{"shell", "SHELL [\"/bin/echo\", \"-n\"]\nRUN x  y", "x  y"},
		{"heredoc", "RUN <<EOF\necho one\necho $((1+1))\nEOF", "one\n2\n"},
		{"heredoc with interpreter", "RUN <<EOF\n#!/bin/sh -e\necho \"$0\" | cat\nEOF", "/dev/pipes/EOF\n"},
		{"heredocs", "RUN cat <<A && cat <<B\nfirst\nA\nsecond\nB", "first\nsecond\n"},
		{"user", "USER app\nRUN id -u; id -g; echo $HOME", "1000\n1001\n/home/app\n"},
		{"user and group", "USER 5:staff\nRUN id -u; id -g", "5\n50\n"},
		{"workdir", "WORKDIR /a/b\nRUN pwd", "/a/b\n"},
		{"environment", "ARG A=arg\nENV E=env A2=$A\nRUN echo $A $E $A2 $PATH", "arg env arg /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"},
		{"hostname", "RUN hostname", "build\n"},
		{"files", "RUN cat /etc/hosts | cat; test -e /etc/resolv.conf && echo yes", "yes\n"},
		{"tmpfs", "RUN --mount=type=tmpfs,target=/t,size=1m touch /t/x && stat -f -c %T /t", "tmpfs\n"},
		{"optional secret", "RUN --mount=type=secret,id=s echo no secret", "no secret\n"},
		{"no network", "RUN --network=none ls /sys/class/net", "lo\n"},
		{"only one process", "RUN echo $$", "1\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e.t = t
			e.must("FROM busybox\n" + c.file + "\n")
			if out := e.output(); !strings.HasSuffix(out, c.out) {
				t.Errorf("output %q, want %q", out, c.out)
			}
		})
	}
}

func TestRunMounts(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	e.write("src/in", "input")
	e.write("src/secret", "hidden")
	e.write(".dockerignore", "src/secret\n")
	img := e.must(`FROM busybox AS tool
RUN echo tool > /tool
FROM busybox
RUN --mount=type=bind,source=src,target=/src --mount=type=bind,from=tool,source=/tool,target=/t/tool cat /src/in /t/tool > /out; ls /src; ! touch /src/x
RUN --mount=type=bind,source=src,target=/src,rw touch /src/x && rm /src/in && ls /src > /rw
RUN --mount=type=bind,source=src,target=/src ls /src > /ro
RUN --mount=type=cache,target=/cache echo 1 >> /cache/n; cat /cache/n > /n1
RUN --mount=type=cache,target=/cache echo 2 >> /cache/n; cat /cache/n > /n2
`)
	tree := e.tree(img)
	for p, want := range map[string]string{"out": "644 0:0 inputtool\n", "n1": "644 0:0 1\n", "n2": "644 0:0 1\n2\n", "rw": "644 0:0 x\n", "ro": "644 0:0 in\n", "cache/n": "", "src/in": "", "src": ""} {
		if tree[p] != want {
			t.Errorf("%s: %q, want %q", p, tree[p], want)
		}
	}
	if out := e.output(); strings.Contains(out, "secret") || !strings.Contains(out, "in\n") {
		t.Errorf("the bind mount showed %q", out)
	}
	e.write("src/in", "changed")
	img = e.must(`FROM busybox
RUN --mount=type=bind,source=src,target=/src cat /src/in > /out
`)
	if got := e.tree(img)["out"]; got != "644 0:0 changed" {
		t.Errorf("after a change: %q", got)
	}
	if _, err := e.build("FROM busybox\nRUN --mount=type=bind,source=none,target=/src true\n"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a source that is missing: %v", err)
	}
	e.clean()
}

// What a step deletes is gone, what it changes is changed, and the base stays as it was.
func TestRunChanges(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	e.write("d/keep", "1")
	e.write("d/old", "2")
	e.write("gone/x", "3")
	img := e.must("FROM busybox\nCOPY d /d\nCOPY gone /gone\nRUN rm /d/old; rm -r /gone; mkdir /gone; echo y > /gone/y; ln /d/keep /d/hard; mv /d/keep /d/kept\n")
	tree := e.tree(img)
	for p, want := range map[string]string{"d/old": "", "d/keep": "", "d/kept": "644 0:0 1", "d/hard": "644 0:0 1", "gone/x": "", "gone/y": "644 0:0 y\n"} {
		if tree[p] != want {
			t.Errorf("%s: %q, want %q", p, tree[p], want)
		}
	}
}

func TestRunFailures(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	for _, c := range []struct {
		file string
		code int
		text string
	}{
		{"FROM busybox\nRUN [\"/none\"]\n", 127, "/none"},
		{"FROM busybox\nRUN [\"/etc/passwd\"]\n", 126, "permission denied"},
		{"FROM busybox\nRUN kill -9 $$; exit 5\n", 5, ""},
		{"FROM scratch\nRUN echo\n", 127, "/bin/sh"},
		{"FROM busybox\nUSER nobody\nRUN true\n", 0, "unable to find user nobody"},
	} {
		_, err := e.build(c.file)
		var se *StepError
		if !errors.As(err, &se) || se.ExitCode != c.code || !strings.Contains(se.Error(), c.text) {
			t.Errorf("%q: want exit code %d and %q: %v", c.file, c.code, c.text, err)
		}
	}
	e.clean()
}

// A step that changes nothing makes no layer.
func TestRunWithoutChange(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	base := e.must("FROM busybox\n")
	img := e.must("FROM busybox\nRUN true\nWORKDIR /tmp\n")
	if len(img.Layers()) != len(base.Layers()) {
		t.Errorf("%d layers on %d", len(img.Layers()), len(base.Layers()))
	}
	for _, h := range img.Config.History {
		if strings.HasPrefix(h.CreatedBy, "RUN") && !h.EmptyLayer {
			t.Error("the history claims a layer for RUN true")
		}
	}
}

// The mount points that conex makes stay out of an image that has no /etc of its own.
func TestRunLeavesNoMountPoints(t *testing.T) {
	e := newEnv(t)
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("no /bin/busybox (Debian: busybox-static)")
	}
	e.write("busybox", string(bin))
	img := e.must("FROM scratch\nCOPY --chmod=755 busybox /sh\nSHELL [\"/sh\", \"-c\"]\nRUN echo x > /x\n")
	tree := e.tree(img)
	delete(tree, "sh")
	if len(tree) != 1 || tree["x"] == "" {
		t.Errorf("tree %v", tree)
	}
}

// helperEnv makes the test binary a builder that TestKilledBuilder kills.
const helperEnv = "CONEX_TEST_BUILD"

// TestMain builds in a process of its own when a test asks for one.
func TestMain(m *testing.M) {
	dir := os.Getenv(helperEnv)
	if dir == "" {
		os.Exit(m.Run())
	}
	root, err := disk.OpenRoot(filepath.Join(dir, "root"))
	if err != nil {
		panic(err)
	}
	state := filepath.Join(dir, "state")
	ls, err := layers.Open(root, layers.Options{State: state})
	if err != nil {
		panic(err)
	}
	images := image.Open(root, blobs.Open(root), ls)
	b := &Builder{Root: root, State: state, Layers: ls, Runtime: runtime.New(),
		Base: func(_ context.Context, ref string, _ ocispec.Platform, _ bool, _ func(int64, int64)) (image.Image, error) {
			return images.Resolve(ref)
		},
	}
	req := Request{Context: filepath.Join(dir, "ctx"), Secrets: map[string]Secret{"s": {Env: helperEnv + "_SECRET"}}, Display: func(ev Event) {
		if ev.Kind == Output {
			_, _ = os.Stdout.WriteString(ev.Text)
		}
	}}
	if key := filepath.Join(dir, "key"); os.Getenv(helperEnv+"_SECRET") != "" {
		req.Agents = map[string]Agent{"default": {Paths: []string{key}}}
	}
	_, err = b.Build(context.Background(), req)
	panic(err) // it is killed before
}

// A builder that is killed leaves what the next build clears away, and of a secret nothing at all.
func TestKilledBuilder(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	key, _ := keyFile(t)
	if err := os.Rename(key, filepath.Join(filepath.Dir(e.ctx), "key")); err != nil {
		t.Fatal(err)
	}
	e.write("Dockerfile", `FROM busybox
RUN --mount=type=secret,id=s --mount=type=ssh --mount=type=cache,target=/c,sharing=private --mount=from=busybox,target=/b,rw \
  test -S $SSH_AUTH_SOCK && cat /run/secrets/s | wc -c; exec sleep 600
`)
	const secret = "k1lled-secret"
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+filepath.Dir(e.ctx), helperEnv+"_SECRET="+secret)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 3)
	if _, err := io.ReadFull(out, buf); err != nil || string(buf) != "13\n" {
		t.Fatalf("%q %v", buf, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), e.root.Path("staging")) || strings.Contains(string(mounts), filepath.Join(e.state, "build")) {
		t.Errorf("mounts of the step show outside (%v)", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // "killed", as it should be
	locks, err := filepath.Glob(filepath.Join(e.state, "build", "*.lock"))
	if err != nil || len(locks) != 1 {
		t.Fatalf("marks of running steps: %v %v", locks, err)
	}
	id := strings.TrimSuffix(filepath.Base(locks[0]), ".lock")
	for _, dir := range []string{e.root.Path(), e.state} {
		if found := holds(t, dir, secret); len(found) > 0 {
			t.Errorf("the secret lies in %v", found)
		}
	}
	// The step dies with its builder, and with it what it was given to see.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var procs []byte
		lists, err := filepath.Glob("/sys/fs/cgroup/*/conex/build-" + id + "/cgroup.procs")
		for _, l := range append(lists, "/sys/fs/cgroup/conex/build-"+id+"/cgroup.procs") {
			data, err := os.ReadFile(l)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			procs = append(procs, data...)
		}
		if err == nil && len(procs) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes of the step: %s %v", procs, err)
		}
	}
	if err := e.root.Sweep(); err != nil {
		t.Fatal(err)
	}
	e.must("FROM busybox\nRUN true\n")
	groups, err := filepath.Glob("/sys/fs/cgroup/*/conex/build-" + id)
	if err != nil || len(groups) > 0 {
		t.Errorf("left: %v %v", groups, err)
	}
	e.clean()
}

func TestDescribesDevices(t *testing.T) {
	dir := t.TempDir()
	if describesDevices(dir, filepath.Join(dir, "none")) {
		t.Error("an empty folder describes devices")
	}
	if err := os.WriteFile(filepath.Join(dir, "gpu.yaml"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if !describesDevices("", dir) {
		t.Error("a specification is overlooked")
	}
}

// Progress bars and long lines come through, and only the end is kept.
func TestOutput(t *testing.T) {
	var got strings.Builder
	v := newJournal(func(ev Event) {
		if ev.Kind == Output {
			got.WriteString(ev.Text)
		}
	}, nil).vertex("", "x")
	o, err := newOutput(v)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for range 3000 {
		want.WriteString("some line of output\n")
	}
	want.WriteString(strings.Repeat("x", 100_000) + "10%\r20%\rend")
	if _, err := o.stdout.WriteString(want.String()); err != nil {
		t.Fatal(err)
	}
	o.started()
	o.wait()
	o.abort()
	if got.String() != want.String() {
		t.Errorf("%d bytes came through of %d", got.Len(), want.Len())
	}
	if tail := o.tail(); len(tail) > tailBytes || !strings.HasSuffix(tail, "20%\rend") {
		t.Errorf("tail of %d bytes: ...%q", len(tail), tail[max(0, len(tail)-20):])
	}
}

func TestStatCache(t *testing.T) {
	dir := t.TempDir()
	root, err := disk.OpenRoot(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	c := openStatCache(root, dir)
	now := time.Unix(1000, 0)
	old := fileStat{Ino: 1, Size: 2, Ctim: 900e9}
	racy := fileStat{Ctim: 999_990e6}
	c.put("a", &old, [32]byte{1}, true, now)
	c.put("racy", &racy, [32]byte{2}, true, now)
	if sum, ok := c.get(&item{path: "a", st: old}); !ok || sum != [32]byte{1} {
		t.Error("the cache does not know what it has just been told")
	}
	if err := c.save(); err != nil {
		t.Fatal(err)
	}
	c = openStatCache(root, dir)
	known, plain := c.seen("a", &old)
	if sum, ok := c.get(&item{path: "a", st: old, known: known}); !ok || known == 0 || sum != [32]byte{1} {
		t.Error("the cache forgot a file")
	}
	if known, _ := c.seen("racy", &racy); known != 0 {
		t.Error("the cache trusts a file that changed in the same tick")
	}
	if _, other := c.seen("b", &old); !plain || other {
		t.Error("the cache forgot which files have no extended attributes")
	}
	changed := old
	changed.Ctim++
	if known, _ := c.seen("a", &changed); known != 0 {
		t.Error("the cache knows a changed file")
	}
	// A build that hashes one file anew and looks at no other keeps what is known of the others; of the file it keeps the new hash alone.
	for i := range 100 {
		c.put(fmt.Sprintf("f%d", i), &old, [32]byte{byte(i)}, false, now)
	}
	c.put("a", &changed, [32]byte{3}, false, now)
	if err := c.save(); err != nil {
		t.Fatal(err)
	}
	c = openStatCache(root, dir)
	if len(c.old.at) != 101 {
		t.Errorf("%d files are known, want 101", len(c.old.at))
	}
	for i := range 100 {
		known, plain := c.seen(fmt.Sprintf("f%d", i), &old)
		if sum, ok := c.get(&item{known: known}); !ok || plain || sum != [32]byte{byte(i)} {
			t.Errorf("file %d: %v %v", i, known, sum)
		}
	}
	if known, _ := c.seen("a", &changed); known == 0 {
		t.Error("the cache forgot the file that changed")
	}
	data, err := os.ReadFile(c.path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		bad := append([]byte(nil), data...)
		bad[i] ^= 1
		if m := decodeStat(bad); m.at != nil {
			t.Fatalf("byte %d flipped, and the cache was believed", i)
		}
		if m := decodeStat(data[:i]); m.at != nil {
			t.Fatalf("cut at %d, and the cache was believed", i)
		}
	}
}

func TestPlaceOfStep(t *testing.T) {
	state := t.TempDir()
	for _, tt := range []struct {
		parent  string
		systemd bool
		want    string
	}{
		{"", false, "conex/build-ID"}, {"/a/b", false, "a/b/build-ID"},
		{"", true, "system.slice/conex-build-ID.scope"}, {"a-b.slice", true, "a.slice/a-b.slice/conex-build-ID.scope"},
	} {
		id := disk.RandomID()
		r, err := own(state, id, tt.parent, tt.systemd)
		if err != nil {
			t.Fatal(err)
		}
		note, err := os.ReadFile(r.path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := placeOf(string(note), id) // as who settles finds it
		if want := strings.ReplaceAll(tt.want, "ID", id); err != nil || got.Path != want || got != r.place {
			t.Errorf("%q, systemd %t: %+v, %v; made at %+v, want %s", tt.parent, tt.systemd, got, err, r.place, want)
		}
		r.release()
	}
	if r, err := own(state, disk.RandomID(), "a/b", true); err == nil {
		r.release()
		t.Error("a parent that is no slice was taken")
	}
}

package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"conex/internal/blobs"
	"conex/internal/collect"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/linux/mount"
	"conex/internal/ocispec"
	"conex/internal/runtime"
)

// env is a root of its own with a builder on it.
type env struct {
	t      testing.TB
	b      *Builder
	images *image.Store
	root   *disk.Root
	state  string
	ctx    string // the context folder

	mu     sync.Mutex
	events []Event
}

func newEnv(t testing.TB) *env {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting layers needs root")
	}
	dir := t.TempDir()
	root, err := disk.OpenRoot(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(dir, "state")
	ls, err := layers.Open(root, layers.Options{State: state})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ls.Unmount(); err != nil {
			t.Errorf("unmount layers: %v", err)
		}
	})
	images := image.Open(root, blobs.Open(root), ls)
	e := &env{t: t, images: images, root: root, state: state, ctx: filepath.Join(dir, "ctx")}
	e.b = &Builder{
		Root: root, State: state, Layers: ls, Runtime: runtime.New(),
		Base: func(_ context.Context, ref string, _ ocispec.Platform, _ bool, _ func(int64, int64)) (image.Image, error) {
			r, err := image.ParseReference(ref)
			if err != nil {
				return image.Image{}, err
			}
			return images.Lookup(r)
		},
	}
	if err := os.Mkdir(e.ctx, 0o755); err != nil {
		t.Fatal(err)
	}
	return e
}

// write puts a file into the context; a name that ends in / is a folder, content that begins with "->" a link.
func (e *env) write(name, content string) {
	e.t.Helper()
	p := filepath.Join(e.ctx, name)
	if strings.HasSuffix(name, "/") {
		if err := os.MkdirAll(p, 0o755); err != nil {
			e.t.Fatal(err)
		}
		return
	}
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		e.t.Fatal(err)
	}
	if target, ok := strings.CutPrefix(content, "->"); ok {
		if err := os.Symlink(target, p); err != nil {
			e.t.Fatal(err)
		}
		return
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		e.t.Fatal(err)
	}
}

// build builds the context with a Dockerfile and remembers the events.
func (e *env) build(file string, change ...func(*Request)) (image.Image, error) {
	e.t.Helper()
	e.write("Dockerfile", file)
	e.events = nil
	req := Request{Context: e.ctx, Display: func(ev Event) { e.mu.Lock(); e.events = append(e.events, ev); e.mu.Unlock() }}
	for _, c := range change {
		c(&req)
	}
	return e.request(e.t.Context(), req)
}

func (e *env) request(ctx context.Context, req Request) (image.Image, error) {
	e.t.Helper()
	lease, err := collect.NewLease(e.root)
	if err != nil {
		e.t.Fatal(err)
	}
	defer lease.Close()
	if req.Export == nil {
		e.tag()(&req)
	}
	res, err := e.b.Build(ctx, req)
	if err != nil {
		return image.Image{}, err
	}
	img, err := e.images.Get(res.ID)
	if err != nil {
		e.t.Fatal(err)
	}
	return img, nil
}

// tag records the image and gives it names.
func (e *env) tag(names ...string) func(*Request) {
	return func(r *Request) {
		r.Export = func(ctx context.Context, x *Export) error {
			var refs []image.Reference
			for _, n := range names {
				ref, err := image.ParseReference(n)
				if err != nil {
					return err
				}
				refs = append(refs, ref)
			}
			_, err := e.images.AddTagged(ctx, x.Config, "", "", "", refs...)
			return err
		}
	}
}

func (e *env) must(file string, change ...func(*Request)) image.Image {
	e.t.Helper()
	img, err := e.build(file, change...)
	if err != nil {
		e.t.Fatalf("build: %v", err)
	}
	return img
}

// ended lists the titles of the vertices that ended so, without their "[stage 1/2] ".
func (e *env) ended(kind EventKind) []string {
	var out []string
	for _, ev := range e.events {
		if ev.Kind == kind && !strings.HasPrefix(ev.Name, "[internal]") && strings.HasPrefix(ev.Name, "[") {
			_, title, _ := strings.Cut(ev.Name, "] ")
			out = append(out, title)
		}
	}
	slices.Sort(out)
	return out
}

func (e *env) output() string {
	var b strings.Builder
	for _, ev := range e.events {
		if ev.Kind == Output {
			b.WriteString(ev.Text)
		}
	}
	return b.String()
}

// tree lists an image's files: "path mode uid:gid content".
func (e *env) tree(img image.Image) map[string]string {
	e.t.Helper()
	out := map[string]string{}
	if len(img.Layers()) == 0 {
		return out
	}
	lower, err := e.b.Layers.Lower(e.t.Context(), img.Layers())
	if err != nil {
		e.t.Fatal(err)
	}
	root, err := mount.Overlay(mount.OverlayOptions{Lower: lower})
	if err != nil {
		e.t.Fatal(err)
	}
	defer root.Close()
	v := &view{root: root}
	sel, err := v.selection(e.t.Context(), []string{"/"}, selectOptions{})
	if err != nil {
		e.t.Fatal(err)
	}
	for _, it := range sel[0].items {
		if it.rel == "" {
			continue
		}
		desc := fmt.Sprintf("%o %d:%d", it.st.Mode&0o7777, it.st.Uid, it.st.Gid)
		switch {
		case it.link != "":
			desc = "-> " + it.link
		case it.st.Mode&0o170000 == 0o100000:
			f, err := v.openFile(&it)
			if err != nil {
				e.t.Fatal(err)
			}
			data := make([]byte, 64)
			n, _ := f.Read(data)
			f.Close()
			desc += " " + string(data[:n])
		}
		out[it.rel] = desc
	}
	return out
}

func (e *env) wantTree(img image.Image, want map[string]string) {
	e.t.Helper()
	got := e.tree(img)
	for p, w := range want {
		if got[p] != w {
			e.t.Errorf("%s: %q, want %q", p, got[p], w)
		}
	}
	for p, g := range got {
		if _, ok := want[p]; !ok {
			e.t.Errorf("%s (%s) should not be there", p, g)
		}
	}
}

// busybox tags an image "busybox" of the host's static busybox.
func (e *env) busybox() {
	e.t.Helper()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		e.t.Skip("no /bin/busybox (Debian: busybox-static)")
	}
	dir := e.ctx
	e.ctx = filepath.Join(e.t.TempDir(), "busybox")
	e.write("bin/busybox", string(bin))
	if err := os.Chmod(filepath.Join(e.ctx, "bin/busybox"), 0o755); err != nil {
		e.t.Fatal(err)
	}
	for _, a := range []string{"sh", "cat", "echo", "touch", "mkdir", "rm", "ls", "id", "env", "sleep", "pwd", "true", "test", "stat", "ln", "date", "seq", "hostname", "mv", "chmod"} {
		e.write("bin/"+a, "->busybox")
	}
	e.write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n")
	e.write("etc/group", "root:x:0:\napp:x:1001:\nstaff:x:50:app\n")
	e.write("tmp/", "")
	e.must("FROM scratch\nCOPY bin /bin\nCOPY etc /etc\nCOPY tmp /tmp\nCMD [\"sh\"]\n", e.tag("busybox"))
	e.ctx = dir
}

func TestCopyScratch(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	e.write("d/x", "X")
	e.write("d/sub/y", "Y")
	e.write("d/l", "->x")
	img := e.must("FROM scratch\nCOPY a /\nCOPY d /dir\nENV K=v\nCMD [\"/a\"]\n")
	e.wantTree(img, map[string]string{
		"a": "644 0:0 A", "dir": "755 0:0", "dir/x": "644 0:0 X", "dir/sub": "755 0:0", "dir/sub/y": "644 0:0 Y", "dir/l": "-> x",
	})
	if got := e.ended(Done); !slices.Equal(got, []string{"COPY a /", "COPY d /dir"}) {
		t.Errorf("first build ran %q", got)
	}
	again := e.must("FROM scratch\nCOPY a /\nCOPY d /dir\nENV K=v\nCMD [\"/a\"]\n")
	if again.ID != img.ID {
		t.Errorf("rebuilt image is %s, was %s", again.ID, img.ID)
	}
	if got := e.ended(Cached); !slices.Equal(got, []string{"COPY a /", "COPY d /dir"}) {
		t.Errorf("second build found %q", got)
	}
}

func TestRun(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	img := e.must("FROM busybox\nARG WHO=world\nENV HELLO=hello\nWORKDIR /w\nRUN echo $HELLO $WHO > out; pwd; id -u; echo oops >&2\nRUN [\"touch\", \"/w/two\"]\n")
	tree := e.tree(img)
	if tree["w/out"] != "644 0:0 hello world\n" || tree["w/two"] != "644 0:0 " {
		t.Errorf("files: %q %q", tree["w/out"], tree["w/two"])
	}
	for _, p := range []string{"etc/resolv.conf", "etc/hosts", "proc", "sys", "dev"} {
		if d, ok := tree[p]; ok {
			t.Errorf("%s (%s) got into the image", p, d)
		}
	}
	if out := e.output(); !strings.Contains(out, "/w\n") || !strings.Contains(out, "oops\n") {
		t.Errorf("output: %q", out)
	}
	again := e.must("FROM busybox\nARG WHO=world\nENV HELLO=hello\nWORKDIR /w\nRUN echo $HELLO $WHO > out; pwd; id -u; echo oops >&2\nRUN [\"touch\", \"/w/two\"]\n")
	if again.ID != img.ID || len(e.ended(Done)) > 0 {
		t.Errorf("rebuild: %s, was %s; ran %q", again.ID, img.ID, e.ended(Done))
	}
}

func TestRunFails(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	_, err := e.build("FROM busybox\n\nRUN echo before; \\\n  echo last words >&2; exit 7\nRUN true\n")
	var se *StepError
	if !errors.As(err, &se) {
		t.Fatalf("%T %v", err, err)
	}
	if se.ExitCode != 7 || se.Line != 3 || !strings.Contains(se.Output, "last words") || !strings.Contains(se.Excerpt, ">>> RUN echo before") {
		t.Errorf("%+v", se)
	}
}

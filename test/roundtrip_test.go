package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"conex/internal/ocispec"
)

// Images go from one tool to the other through a real registry and stay, byte by byte, what they are.

// tool runs another program in the world's network namespace and fails the test unless it succeeds.
func (w *world) tool(name string, args ...string) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = w.dir
	cmd.WaitDelay = 5 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	w.start(cmd)
	if err := cmd.Wait(); err != nil {
		w.t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out.String())
	}
	return strings.TrimSpace(out.String())
}

// podman runs podman with data folders of its own, on plain http.
func (w *world) podman(args ...string) string {
	w.t.Helper()
	bin := need(w.t, "podman", "podman")
	if w.podmanDir == "" {
		dir, err := os.MkdirTemp("/run", "podman.") // podman wants it short
		if err != nil {
			w.t.Fatal(err)
		}
		w.podmanDir = dir
		w.t.Cleanup(func() {
			unmountBelow(w.t, dir)
			if err := os.RemoveAll(dir); err != nil {
				w.t.Error(err)
			}
		})
	}
	return w.tool(bin, append([]string{"--root", filepath.Join(w.dir, "podman"), "--runroot", w.podmanDir + "/run", "--tmpdir", w.podmanDir + "/tmp",
		"--storage-driver", "vfs", "--events-backend", "none", "--cgroup-manager", "cgroupfs"}, args...)...)
}

// wantSame compares a manifest or an index, and the configs below it, in two registries.
func wantSame(t *testing.T, a *registry, nameA string, b *registry, nameB string) {
	t.Helper()
	rawA, digest := a.raw(nameA)
	rawB, got := b.raw(nameB)
	if got != digest || !bytes.Equal(rawA, rawB) {
		t.Errorf("%s is %s:\n%s\n%s was %s:\n%s", nameB, got, compact(rawB), nameA, digest, compact(rawA))
		return
	}
	repoA, _, _ := strings.Cut(nameA, ":")
	repoB, _, _ := strings.Cut(nameB, ":")
	var m struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(rawB, &m); err != nil {
		t.Fatal(err)
	}
	if m.Config != nil {
		if x, y := a.blob(repoA, m.Config.Digest), b.blob(repoB, m.Config.Digest); !bytes.Equal(x, y) {
			t.Errorf("the config is %s, was %s", compact(y), compact(x))
		}
	}
	for _, d := range m.Manifests {
		wantSame(t, a, repoA+"@"+string(d.Digest), b, repoB+"@"+string(d.Digest))
	}
}

// blob is a blob of the registry, past the proxy.
func (r *registry) blob(repo string, d ocispec.Digest) []byte {
	r.w.t.Helper()
	return []byte(r.w.get("http://" + r.direct + "/v2/" + strings.Split(repo, "@")[0] + "/blobs/" + string(d)))
}

// wantWhole downloads an image with crane's library, which compares every blob with its digest, and those that it can unpack with the
// config.
func (r *registry) wantWhole(s string) {
	r.w.t.Helper()
	img, err := remote.Image(r.ref(s), r.w.remote()...)
	if err != nil {
		r.w.t.Errorf("crane on %s: %v", s, err)
		return
	}
	layers, err := img.Layers()
	if err != nil {
		r.w.t.Errorf("crane on %s: %v", s, err)
	}
	unpacks := true
	for _, l := range layers {
		rc, err := l.Compressed()
		if err == nil {
			_, err = io.Copy(io.Discard, rc)
			rc.Close()
		}
		mt, merr := l.MediaType()
		if err = errors.Join(err, merr); err != nil {
			r.w.t.Errorf("crane on %s: %v", s, err)
		}
		unpacks = unpacks && (mt == types.OCILayer || mt == types.DockerLayer)
	}
	if unpacks {
		if err := validate.Image(img); err != nil {
			r.w.t.Errorf("crane on %s: %v", s, err)
		}
	}
}

// What conex pulled it pushes bit by bit: to another registry, to another repository of the same by mounts, and again by nothing at all.
func TestPushForms(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	from, to := w.serveRegistry(), w.serveRegistry()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			src := f.String() + ":1"
			from.put(src, f.image(t, "linux/amd64", busybox(t), tarOf(t, map[string][]byte{"etc/motd": []byte("hello\n"), f.String(): noise(3, 2<<20)})))
			w.conex("pull", "-q", from.addr+"/"+src)
			push := func(r *registry, name string) []exchange {
				t.Helper()
				w.conex("tag", from.addr+"/"+src, r.addr+"/"+name)
				r.forget()
				w.conex("push", r.addr+"/"+name)
				return r.forget()
			}
			dst := "copies/" + src
			push(to, dst)
			wantSame(t, from, src, to, dst)
			to.wantWhole(dst)

			log := push(to, dst)
			if n := count(log, http.MethodPost, "/blobs/uploads/"); n != 0 {
				t.Errorf("what is there is sent again: %v", log)
			}
			log = push(from, "mounted/"+src)
			sent := count(log, http.MethodPut, "/blobs/uploads/") + count(log, http.MethodPatch, "/blobs/uploads/")
			if sent != 0 || count(log, http.MethodPost, "/blobs/uploads/") == 0 {
				t.Errorf("in the registry that it is from, %d blobs were sent: %v", sent, log)
			}
			wantSame(t, from, src, from, "mounted/"+src)
		})
	}
	w.checkStore()
	w.wantNoLeftovers()
}

// An index goes as a whole once all of it is here; before that the image for this machine.
func TestPushIndex(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	from, to := w.serveRegistry(), w.serveRegistry()
	for _, f := range []form{{false, "gzip"}, {true, "gzip"}} {
		t.Run(f.String(), func(t *testing.T) {
			images := map[string]v1.Image{}
			platforms := []string{"linux/amd64", "linux/arm64", "linux/arm/v7"}
			for i, p := range platforms {
				images[p] = f.image(t, p, busybox(t), tarOf(t, map[string][]byte{"etc/motd": []byte("for " + p + "\n"), "noise": noise(byte(i), 1<<20)}))
			}
			name := f.String() + ":multi"
			from.put(name, f.index(t, images))
			w.conex("pull", "-q", from.addr+"/"+name)
			w.conex("tag", from.addr+"/"+name, to.addr+"/one/"+name)
			w.conex("push", "-q", to.addr+"/one/"+name)
			if _, got := to.raw("one/" + name); got != digestOf(t, images["linux/amd64"]) {
				t.Errorf("of one platform %s was pushed, its manifest is %s", got, digestOf(t, images["linux/amd64"]))
			}
			for _, p := range platforms {
				w.conex("pull", "-q", "--platform", p, from.addr+"/"+name)
			}
			w.conex("tag", from.addr+"/"+name, to.addr+"/all/"+name)
			w.conex("push", to.addr+"/all/"+name)
			wantSame(t, from, name, to, "all/"+name)
			for _, p := range platforms {
				to.wantWhole("all/" + f.String() + "@" + digestOf(t, images[p]))
			}
		})
	}
	w.checkStore()
	w.wantNoLeftovers()
}

// What was built here is pushed in the form that is asked for, and the same when it is pushed again.
func TestPushBuilt(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	r := w.serveRegistry()
	path, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	w.conex("import", path, "base")
	dir := w.write("app/Dockerfile", "FROM base\nRUN echo made here >/etc/motd\nCOPY big /\nCMD [\"cat\",\"/etc/motd\"]\n")
	if err := os.WriteFile(filepath.Join(dir, "big"), noise(9, 3<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	w.conex("build", "-q", "-t", "app", dir)
	id := w.conex("image", "inspect", "-f", "{{.Id}}", "app")
	for _, args := range [][]string{nil, {"--compression", "zstd"}, {"--compression", "gzip", "--compression-level", "9"}} {
		name := "app" + strings.Join(args, "")
		name = strings.ReplaceAll(name, "--", "-")
		w.conex("tag", "app", r.addr+"/"+name)
		w.conex(append(append([]string{"push", "-q"}, args...), r.addr+"/"+name)...)
		r.wantWhole(name + ":latest")
		if _, first := r.raw(name + ":latest"); first != "" {
			w.conex(append(append([]string{"push", "-q"}, args...), r.addr+"/"+name)...)
			if _, again := r.raw(name + ":latest"); again != first {
				t.Errorf("%v: pushed again it is %s, was %s", args, again, first)
			}
		}
		raw, _ := r.raw(name + ":latest")
		if !strings.Contains(string(raw), id) {
			t.Errorf("%v: the config is not %s: %s", args, id, raw)
		}
		if want := map[bool]string{true: "zstd", false: "gzip"}[len(args) == 2]; !strings.Contains(string(raw), want) {
			t.Errorf("%v: %s", args, raw)
		}
		// Another installation runs it.
		other := bareWorld(t)
		other.netns = w.netns
		other.conex("pull", "-q", r.addr+"/"+name)
		if got := other.conex("run", "--rm", "--network", "none", r.addr+"/"+name); got != "made here" {
			t.Errorf("%v: the container says %q", args, got)
		}
		other.checkStore()
		other.netns = nil // it is ours
	}
}

// What skopeo, podman and umoci make of images that conex pushed, and conex of theirs.
func TestPeers(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	from, to := w.serveRegistry(), w.serveRegistry()
	skopeo := need(t, "skopeo", "skopeo")
	copyTo := func(args ...string) {
		t.Helper()
		w.tool(skopeo, append([]string{"copy", "--quiet", "--insecure-policy", "--src-tls-verify=false", "--dest-tls-verify=false"}, args...)...)
	}
	pushed := func(f form) (name string) { // pulled by conex from one registry, pushed to the other
		name = f.String() + ":1"
		from.put(name, f.image(t, "linux/amd64", busybox(t), tarOf(t, map[string][]byte{"etc/motd": []byte(f.String() + "\n"), "noise": noise(4, 1<<20)})))
		w.conex("pull", "-q", from.addr+"/"+name)
		w.conex("tag", from.addr+"/"+name, to.addr+"/"+name)
		w.conex("push", "-q", to.addr+"/"+name)
		return name
	}
	for _, f := range forms {
		name := pushed(f)
		raw, digest := from.raw(name)
		id := w.conex("image", "inspect", "-f", "{{.Id}}", to.addr+"/"+name)
		t.Run("skopeo/"+f.String(), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "copy")
			copyTo("docker://"+to.addr+"/"+name, "dir:"+dir)
			if got, err := os.ReadFile(filepath.Join(dir, "manifest.json")); err != nil || !bytes.Equal(got, raw) {
				t.Errorf("skopeo pulled %s, %v, want %s", compact(got), err, compact(raw))
			}
			if _, err := os.Stat(filepath.Join(dir, strings.TrimPrefix(id, "sha256:"))); err != nil {
				t.Errorf("the config: %v", err)
			}
			copyTo("dir:"+dir, "docker://"+to.addr+"/by-skopeo/"+name)
			w.conex("pull", "-q", to.addr+"/by-skopeo/"+name)
			if got := w.repoDigest(to.addr + "/by-skopeo/" + name); got != digest {
				t.Errorf("skopeo pushed what conex pulls as %s, was %s", got, digest)
			}
		})
		t.Run("umoci/"+f.String(), func(t *testing.T) {
			umoci := need(t, "umoci", "umoci")
			if f.docker || f.packed == "zstd" {
				t.Skip("Debian's umoci knows neither Docker's manifests nor zstd")
			}
			dir := t.TempDir()
			copyTo("docker://"+to.addr+"/"+name, "oci:"+dir+"/layout:1")
			w.tool(umoci, "unpack", "--image", dir+"/layout:1", dir+"/bundle")
			if got, err := os.ReadFile(dir + "/bundle/rootfs/etc/motd"); err != nil || string(got) != f.String()+"\n" {
				t.Errorf("umoci unpacked %q, %v", got, err)
			}
			if err := os.WriteFile(dir+"/bundle/rootfs/etc/motd", []byte("changed by umoci\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			w.tool(umoci, "repack", "--image", dir+"/layout:2", dir+"/bundle")
			copyTo("oci:"+dir+"/layout:2", "docker://"+to.addr+"/by-umoci/"+name)
			w.conex("pull", "-q", to.addr+"/by-umoci/"+name)
			if got := w.conex("run", "--rm", "--network", "none", to.addr+"/by-umoci/"+name); got != "changed by umoci" {
				t.Errorf("the container says %q", got)
			}
		})
		t.Run("podman/"+f.String(), func(t *testing.T) {
			need(t, "podman", "podman")
			w.podman("pull", "-q", "--tls-verify=false", to.addr+"/"+name)
			if got := w.podman("image", "inspect", "--format", "sha256:{{.Id}} {{.Digest}}", to.addr+"/"+name); got != id+" "+digest {
				t.Errorf("podman has %s, want %s %s", got, id, digest)
			}
			// podman compresses anew what it pushes; the config stays.
			w.podman("push", "-q", "--tls-verify=false", to.addr+"/"+name, to.addr+"/by-podman/"+name)
			w.conex("pull", "-q", to.addr+"/by-podman/"+name)
			if got := w.conex("run", "--rm", "--network", "none", to.addr+"/by-podman/"+name); got != f.String() {
				t.Errorf("the container says %q", got)
			}
			if _, by := to.raw("by-podman/" + name); w.repoDigest(to.addr+"/by-podman/"+name) != by {
				t.Errorf("pulled %s, the registry has %s", w.repoDigest(to.addr+"/by-podman/"+name), by)
			}
		})
	}
	t.Run("skopeo/index", func(t *testing.T) {
		f := form{false, "gzip"}
		images := map[string]v1.Image{}
		for i, p := range []string{"linux/amd64", "linux/arm64"} {
			images[p] = f.image(t, p, tarOf(t, map[string][]byte{"noise": noise(byte(20+i), 1<<20)}))
		}
		// By crane and skopeo to one registry, by conex to the other, by skopeo to a folder.
		dir := t.TempDir()
		from.put("by-crane:multi", f.index(t, images))
		copyTo("--all", "docker://"+from.addr+"/by-crane:multi", "docker://"+from.addr+"/by-skopeo:multi")
		for p := range images {
			w.conex("pull", "-q", "--platform", p, from.addr+"/by-skopeo:multi")
		}
		w.conex("tag", from.addr+"/by-skopeo:multi", to.addr+"/by-conex:multi")
		w.conex("push", "-q", to.addr+"/by-conex:multi")
		copyTo("--all", "docker://"+to.addr+"/by-conex:multi", "dir:"+dir+"/copy")
		want, _ := from.raw("by-skopeo:multi") // crane's words for it are not skopeo's
		if got, err := os.ReadFile(dir + "/copy/manifest.json"); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the index arrives as %s, %v, was %s", compact(got), err, compact(want))
		}
	})
	w.checkStore()
	w.wantNoLeftovers()
}

// All tags of a repository come and go.
func TestAllTags(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	from, to := w.serveRegistry(), w.serveRegistry()
	for i := range 5 {
		from.put(fmt.Sprintf("many:%d", i), forms[i%len(forms)].image(t, "linux/amd64", busybox(t), tarOf(t, map[string][]byte{"etc/motd": fmt.Appendf(nil, "%d\n", i)})))
	}
	from.forget()
	w.conex("pull", "-a", from.addr+"/many")
	for _, e := range from.forget() {
		if e.method == http.MethodGet && e.down > 4<<20 {
			t.Errorf("a common layer came more than once: %v", e)
		}
	}
	for i := range 5 {
		src := fmt.Sprintf("many:%d", i)
		if got := w.conex("run", "--rm", "--network", "none", from.addr+"/"+src); got != fmt.Sprint(i) {
			t.Errorf("%s says %q", src, got)
		}
		w.conex("tag", from.addr+"/"+src, to.addr+"/copy/"+src)
	}
	w.conex("push", "--all-tags", to.addr+"/copy/many")
	for i := range 5 {
		wantSame(t, from, fmt.Sprintf("many:%d", i), to, fmt.Sprintf("copy/many:%d", i))
	}
	w.checkStore()
	w.wantNoLeftovers()
}

// A push survives what happens to connections and registries.
func TestPushBacksOff(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	from, to := w.serveRegistry(), w.serveRegistry()
	from.put("app:1", forms[0].image(t, "linux/amd64", busybox(t), tarOf(t, map[string][]byte{"noise": noise(5, 4<<20)})))
	w.conex("pull", "-q", from.addr+"/app:1")
	seen := map[string]int{}
	to.behave(func(req *http.Request) conduct {
		to.mu.Lock()
		defer to.mu.Unlock()
		if req.URL.Path == "/v2/" {
			return conduct{}
		}
		key := req.Method + " " + strings.SplitN(req.URL.Path, "/uploads/", 2)[0]
		if seen[key]++; seen[key] > 1 {
			return conduct{}
		}
		if seen[key] == 1 && req.Method == http.MethodHead {
			return conduct{status: http.StatusTooManyRequests, header: map[string]string{"Retry-After": "1"}}
		}
		return conduct{status: http.StatusServiceUnavailable}
	})
	w.conex("tag", from.addr+"/app:1", to.addr+"/app:1")
	if res := w.try("push", "-q", to.addr+"/app:1"); res.code != 0 {
		t.Errorf("exit code %d: %s\n%v", res.code, res.stderr, to.forget())
	}
	wantSame(t, from, "app:1", to, "app:1")
	// A registry that is not there is said to be so, in a line.
	if res := w.try("push", "-q", "127.0.0.1:1/app:1"); res.code != 1 || strings.Count(res.stderr, "\n") != 1 {
		t.Errorf("%d, %s", res.code, res.stderr)
	}
}

// A push that is killed or told to stop leaves nothing that keeps the next one from its work, and no half an image in the registry.
func TestPushInterrupted(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	from, to := w.serveRegistry(), w.serveRegistry()
	var tars [][]byte
	for i := range 4 {
		tars = append(tars, tarOf(t, map[string][]byte{fmt.Sprintf("noise%d", i): noise(byte(i), 4<<20)}))
	}
	from.put("app:1", forms[0].image(t, "linux/amd64", tars...))
	w.conex("pull", "-q", from.addr+"/app:1")
	w.conex("tag", from.addr+"/app:1", to.addr+"/app:1")
	line := &pacer{perSecond: 16 << 20}
	to.behave(func(*http.Request) conduct { return conduct{pace: line} })
	for i := range 8 {
		cmd := w.command("push", to.addr+"/app:1")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		w.start(cmd)
		time.Sleep(time.Duration(i) * 60 * time.Millisecond)
		sig := []syscall.Signal{syscall.SIGKILL, syscall.SIGINT}[i%2]
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		if sig == syscall.SIGINT && !interrupted(cmd) {
			t.Errorf("Ctrl-C after %d ms: %v\n%s", i*60, cmd.ProcessState, out.String())
		}
		if _, err := remote.Get(to.ref("app:1"), w.remote()...); err == nil && i < 6 {
			to.wantWhole("app:1")
		}
	}
	w.conex("push", "-q", to.addr+"/app:1")
	wantSame(t, from, "app:1", to, "app:1")
	to.wantWhole("app:1")
	w.checkStore()
	w.wantNoLeftovers()
}

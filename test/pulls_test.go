package test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

var quietLog = log.New(io.Discard, "", 0)

// busybox is the tar of the fixture's root.
func busybox(t *testing.T) []byte {
	t.Helper()
	path, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// tarOf makes a tar of regular files.
func tarOf(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(files[name])), ModTime: time.Unix(1700000000, 0)}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// noise is n bytes that no compressor makes smaller, others for each seed.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b) //nolint:errcheck // never fails
	return b
}

// blob is a blob of the world's store, which the test reads past conex.
func (w *world) blob(digest string) []byte {
	w.t.Helper()
	b, err := os.ReadFile(filepath.Join(w.root, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:")))
	if err != nil {
		w.t.Fatalf("blob %s: %v", digest, err)
	}
	return b
}

// checkStore verifies every blob and every layer against its digest, and that conex finds nothing wrong either.
func (w *world) checkStore() {
	w.t.Helper()
	root, err := disk.OpenRoot(w.root)
	if err != nil {
		w.t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Join(w.root, "blobs", "sha256"))
	if err != nil {
		w.t.Fatal(err)
	}
	bs := blobs.Open(root)
	for _, e := range entries {
		d := ocispec.Digest("sha256:" + e.Name())
		rc, _, err := bs.Open(d)
		if err == nil {
			_, err = io.Copy(io.Discard, rc)
			rc.Close()
		}
		if err != nil {
			w.t.Errorf("blob %s: %v", d, err)
		}
	}
	ls, err := layers.Open(root, layers.Options{State: w.state, Driver: w.driver})
	if err != nil {
		w.t.Fatal(err)
	}
	entries, err = os.ReadDir(filepath.Join(w.root, "layers"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if len(e.Name()) != 64 {
			continue // the driver's own
		}
		d := ocispec.Digest("sha256:" + e.Name())
		rc, _, err := ls.OpenTar(d)
		if err != nil {
			w.t.Errorf("layer %s: %v", d, err)
			continue
		}
		h, _, err := v1.SHA256(rc)
		rc.Close()
		if err != nil || h.String() != string(d) {
			w.t.Errorf("layer %s has digest %s, %v", d, h, err)
		}
	}
	if r := w.try("system", "check", "--quiet"); r.code != 0 {
		w.t.Errorf("system check: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// wantNoLeftovers checks that no download and nothing half made is left.
func (w *world) wantNoLeftovers() {
	w.t.Helper()
	for _, dir := range []string{"staging", "downloads"} {
		entries, err := os.ReadDir(filepath.Join(w.root, dir))
		if err != nil {
			continue // never made
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), ".lock") {
				w.t.Errorf("left in %s: %s", dir, e.Name())
			}
		}
	}
}

// repoDigest is the digest that an image's name had in its registry when it was pulled.
func (w *world) repoDigest(name string) string {
	w.t.Helper()
	repo := name[:strings.LastIndexByte(name, ':')]
	for _, d := range strings.Fields(w.conex("image", "inspect", "-f", "{{join .RepoDigests \" \"}}", name)) {
		if r, digest, _ := strings.Cut(d, "@"); r == repo {
			return digest
		}
	}
	w.t.Errorf("%s has no digest", name)
	return ""
}

// Images in every form that registries have come over byte by byte, and run.
func TestPullForms(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	r := w.serveRegistry()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			motd := "made as " + f.String() + "\n"
			name := r.addr + "/" + f.String() + ":1"
			img := f.image(t, "linux/amd64", busybox(t), tarOf(t, map[string][]byte{"etc/motd": []byte(motd), "noise": noise(1, 3<<20)}))
			r.put(f.String()+":1", img)
			w.conex("pull", "-q", name)
			raw, digest := r.raw(f.String() + ":1")
			if got := w.repoDigest(name); got != digest {
				t.Errorf("pulled %s, the registry has %s", got, digest)
			}
			if got := w.blob(digest); !bytes.Equal(got, raw) {
				t.Errorf("the manifest is %s, in the registry %s", compact(got), compact(raw))
			}
			config, err := img.RawConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			id := w.conex("image", "inspect", "-f", "{{.Id}}", name)
			if got := w.blob(id); !bytes.Equal(got, config) {
				t.Errorf("the config is %s, in the registry %s", compact(got), compact(config))
			}
			if got := w.conex("run", "--rm", "--network", "none", name); got+"\n" != motd {
				t.Errorf("the container says %q", got)
			}
			// The same by digest; and a second pull of what is unchanged asks for the manifest and nothing else.
			r.forget()
			byDigest := r.addr + "/" + f.String() + "@" + digest
			w.conex("pull", "-q", byDigest)
			w.conex("pull", name)
			for _, e := range r.forget() {
				if e.path != "/v2/" && !strings.Contains(e.path, "/manifests/") {
					t.Errorf("an unchanged image is pulled by %s", e)
				}
			}
			if got := w.conex("image", "inspect", "-f", "{{.Id}}", byDigest); got != id {
				t.Errorf("by digest it is %s", got)
			}
		})
	}
	w.checkStore()
	w.wantNoLeftovers()
}

// Of an index the image for this machine comes, or the one that is asked for, and nothing of the others.
func TestPullIndex(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	r := w.serveRegistry()
	for _, f := range []form{{false, "zstd"}, {true, "gzip"}} {
		t.Run(f.String(), func(t *testing.T) {
			images := map[string]v1.Image{}
			for i, p := range []string{"linux/amd64", "linux/arm64", "linux/arm/v7"} {
				images[p] = f.image(t, p, busybox(t), tarOf(t, map[string][]byte{"etc/motd": []byte("for " + p + "\n"), "noise": noise(byte(i), 1<<20)}))
			}
			ix := f.index(t, images)
			r.put(f.String()+":multi", ix)
			name := r.addr + "/" + f.String() + ":multi"
			r.forget()
			w.conex("pull", "-q", name)
			if _, down := sum(r.forget()); down > 4<<20 {
				t.Errorf("%d bytes came for one of three images of 2.5 MB", down)
			}
			if got := w.repoDigest(name); got != digestOf(t, ix) {
				t.Errorf("the repository digest is %s, the index has %s", got, digestOf(t, ix))
			}
			if got := w.conex("run", "--rm", "--network", "none", name); got != "for linux/amd64" {
				t.Errorf("the container says %q", got)
			}
			w.conex("pull", "-q", "--platform", "linux/arm/v7", name)
			raw, err := ix.RawManifest()
			if err != nil {
				t.Fatal(err)
			}
			if got := w.blob(digestOf(t, ix)); !bytes.Equal(got, raw) {
				t.Errorf("the index is %s", compact(got))
			}
			for _, p := range []string{"linux/amd64", "linux/arm/v7"} {
				want, err := images[p].RawManifest()
				if err != nil {
					t.Fatal(err)
				}
				if got := w.blob(digestOf(t, images[p])); !bytes.Equal(got, want) {
					t.Errorf("the manifest for %s is %s", p, compact(got))
				}
			}
			if r := w.try("pull", "--platform", "linux/riscv64", name); r.code != 1 || !strings.Contains(r.stderr, "linux/riscv64") || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("a platform that is not there: %d, %s", r.code, r.stderr)
			}
		})
	}
	w.checkStore()
	w.wantNoLeftovers()
}

// interrupted says whether a command ended as Ctrl-C ends one: with 130, or by the signal itself before it was ready to catch it.
func interrupted(cmd *exec.Cmd) bool {
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ws.Exited() && ws.ExitStatus() == 130 || ws.Signaled() && ws.Signal() == syscall.SIGINT
}

// Killed, told to stop and cut off twenty times at random moments, a pull fetches no more than a tenth twice.
func TestPullInterrupted(t *testing.T) {
	for _, how := range []string{"kill -9", "Ctrl-C", "dropped connections"} {
		t.Run(strings.ReplaceAll(how, " ", "_"), func(t *testing.T) {
			w := bareWorld(t)
			w.netns = newNetns(t)
			r := w.serveRegistry()
			var tars [][]byte
			tars = append(tars, busybox(t), tarOf(t, map[string][]byte{"etc/motd": []byte("whole\n")}))
			for i := range 4 {
				tars = append(tars, tarOf(t, map[string][]byte{fmt.Sprintf("noise%d", i): noise(byte(i), 10<<20)}))
			}
			r.put("big:1", forms[0].image(t, "linux/amd64", tars...))
			name := r.addr + "/big:1"
			var size int64
			var m struct {
				Config ocispec.Descriptor   `json:"config"`
				Layers []ocispec.Descriptor `json:"layers"`
			}
			raw, _ := r.raw("big:1")
			if err := json.Unmarshal(raw, &m); err != nil {
				t.Fatal(err)
			}
			for _, d := range append(m.Layers, m.Config) {
				size += d.Size
			}
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			line := &pacer{perSecond: 24 << 20}
			var mu sync.Mutex
			cuts := 0
			r.behave(func(req *http.Request) conduct {
				c := conduct{}
				if strings.Contains(req.URL.Path, "/blobs/") {
					c.pace = line
					mu.Lock()
					if how == "dropped connections" && cuts < 20 {
						c.cut = 1 + rng.Int64N(4<<20)
						cuts++
					}
					mu.Unlock()
				}
				return c
			})
			r.forget()
			begun, ended := 0, 0
			for range 20 {
				cmd := w.command("pull", name)
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				w.start(cmd)
				begun++
				if how == "dropped connections" {
					if err := cmd.Wait(); err == nil {
						ended++
						break // retried all by itself
					}
					continue
				}
				mu.Lock()
				pause := time.Duration(rng.IntN(150)) * time.Millisecond
				mu.Unlock()
				time.Sleep(pause)
				sig := syscall.SIGKILL
				if how == "Ctrl-C" {
					sig = syscall.SIGINT
				}
				if err := cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
				cmd.Wait()
				if cmd.ProcessState.ExitCode() == 0 {
					ended++
				} else if how == "Ctrl-C" && !interrupted(cmd) {
					t.Errorf("Ctrl-C after %v ends with %v:\n%s", pause, cmd.ProcessState, out.String())
				}
			}
			if how == "dropped connections" {
				r.behave(nil)
			}
			w.conex("pull", "-q", name)
			_, down := sum(r.forget())
			t.Logf("%d pulls, %d connections cut, %d got to the end; %d bytes came for an image of %d: %.3f", begun+1, cuts, ended, down, size, float64(down)/float64(size))
			if float64(down) > 1.1*float64(size) {
				t.Errorf("%d bytes came for an image of %d", down, size)
			}
			w.checkStore()
			w.wantNoLeftovers()
			if got := w.conex("run", "--rm", "--network", "none", name, "sh", "-c", "cat /etc/motd; cat /noise* | wc -c"); got != fmt.Sprintf("whole\n%d", 40<<20) {
				t.Errorf("the container says %q", got)
			}
		})
	}
}

// Processes that pull the same image at the same time share the work.
func TestPullTogether(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	r := w.serveRegistry()
	var tars [][]byte
	for i := range 4 {
		tars = append(tars, tarOf(t, map[string][]byte{fmt.Sprintf("noise%d", i): noise(byte(i), 4<<20)}))
	}
	r.put("big:1", forms[0].image(t, "linux/amd64", tars...))
	line := &pacer{perSecond: 16 << 20}
	r.behave(func(*http.Request) conduct { return conduct{pace: line} })
	r.forget()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if res := w.try("pull", "-q", r.addr+"/big:1"); res.code != 0 {
				t.Errorf("exit code %d: %s", res.code, res.stderr)
			}
		})
	}
	wg.Wait()
	log := r.forget()
	seen := map[string]int{}
	for _, e := range log {
		if e.method == http.MethodGet && strings.Contains(e.path, "/blobs/") && e.down > 1<<20 {
			seen[e.path]++
		}
	}
	if len(seen) != 4 {
		t.Errorf("%d layers were asked for, want 4", len(seen))
	}
	for p, n := range seen {
		if n != 1 {
			t.Errorf("%s was fetched %d times by four processes", p, n)
		}
	}
	w.checkStore()
	w.wantNoLeftovers()
}

// Who waits for a process that is killed goes on where that one was.
func TestPullTakenOver(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	r := w.serveRegistry()
	r.put("big:1", forms[0].image(t, "linux/amd64", tarOf(t, map[string][]byte{"noise": noise(1, 16<<20)})))
	line := &pacer{perSecond: 12 << 20}
	r.behave(func(*http.Request) conduct { return conduct{pace: line} })
	r.forget()
	var killed []*exec.Cmd
	for range 3 {
		cmd := w.command("pull", r.addr+"/big:1")
		w.start(cmd)
		killed = append(killed, cmd)
	}
	waiter := w.command("pull", "--progress", "plain", r.addr+"/big:1")
	var out bytes.Buffer
	waiter.Stdout, waiter.Stderr = &out, &out
	w.start(waiter)
	for _, cmd := range killed {
		time.Sleep(200 * time.Millisecond)
		kill9(t, cmd.Process.Pid)
		cmd.Wait()
	}
	if err := waiter.Wait(); err != nil {
		t.Errorf("%v: %s", err, out.String())
	}
	if _, down := sum(r.forget()); down > 16<<20*11/10 {
		t.Errorf("%d bytes came for an image of %d", down, 16<<20)
	}
	w.conex("pull", "-q", r.addr+"/big:1") // which clears away what the dead had begun
	w.checkStore()
	w.wantNoLeftovers()
}

// A registry that has too much to do is asked again, not before the time that it says.
func TestPullBacksOff(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	r := w.serveRegistry()
	r.put("small:1", forms[0].image(t, "linux/amd64", busybox(t)))
	for _, status := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusBadGateway} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			var mu sync.Mutex
			seen := map[string]int{}
			refused := map[string]time.Time{}
			r.behave(func(req *http.Request) conduct {
				mu.Lock()
				defer mu.Unlock()
				if req.URL.Path == "/v2/" {
					return conduct{}
				}
				seen[req.URL.Path]++
				if seen[req.URL.Path] > 1 {
					return conduct{}
				}
				c := conduct{status: status}
				if status == http.StatusTooManyRequests {
					c.header = map[string]string{"Retry-After": "1"}
					refused[req.URL.Path] = time.Now()
				}
				return c
			})
			defer r.behave(nil)
			r.forget()
			res := w.try("pull", "-q", r.addr+"/small:1")
			if res.code != 0 {
				t.Errorf("exit code %d: %s", res.code, res.stderr)
			}
			log := r.forget()
			mu.Lock()
			defer mu.Unlock()
			if status == http.StatusTooManyRequests {
				again := map[string]bool{}
				for _, e := range log {
					if at, ok := refused[e.path]; ok && e.status == http.StatusOK && !again[e.path] {
						again[e.path] = true
						if waited := e.at.Sub(at); waited < 900*time.Millisecond {
							t.Errorf("%s is asked for again after %v, it said 1 s", e.path, waited)
						}
					}
				}
				if len(again) != len(refused) || len(again) < 3 {
					t.Errorf("of %d that were refused %d were asked for again: %v", len(refused), len(again), log)
				}
			}
			if n := count(log, http.MethodGet, "/blobs/"); n != 4 {
				t.Errorf("%d requests for two blobs, each refused once:\n%v", n, log)
			}
			w.conex("rmi", r.addr+"/small:1")
		})
	}
	r.behave(func(*http.Request) conduct {
		return conduct{status: http.StatusTooManyRequests, header: map[string]string{"Retry-After": "0"}}
	})
	if res := w.try("pull", "-q", r.addr+"/small:1"); res.code != 1 || strings.Count(res.stderr, "\n") != 1 || !strings.Contains(res.stderr, "too many requests") {
		t.Errorf("a registry that never has time: %d, %s", res.code, res.stderr)
	}
}

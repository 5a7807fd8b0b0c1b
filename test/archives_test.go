package test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// peer is another program of this field, with data of its own below the world's scratch folder.
type peer struct {
	w    *world
	argv []string
	env  []string
}

// newPeer finds a program, or skips the test.
func (w *world) newPeer(argv ...string) *peer {
	w.t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		w.t.Skipf("%s is not installed", argv[0])
	}
	return &peer{w: w, argv: argv}
}

// try runs the program in the world's network namespace.
func (p *peer) try(args ...string) (string, error) {
	p.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	args = append(p.argv[1:len(p.argv):len(p.argv)], args...)
	cmd := exec.CommandContext(ctx, p.argv[0], args...)
	cmd.Dir, cmd.Env, cmd.WaitDelay = p.w.dir, append(os.Environ(), p.env...), 5*time.Second
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	p.w.start(cmd)
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(p.argv[0]), strings.Join(args, " "), err, out.String(), errb.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// run is try for what must succeed.
func (p *peer) run(args ...string) string {
	p.w.t.Helper()
	out, err := p.try(args...)
	if err != nil {
		p.w.t.Fatal(err)
	}
	return out
}

// greeter builds the image "greeter" of two layers and returns its id. It prints "hello from a file".
func (w *world) greeter() string {
	w.t.Helper()
	image, err := busyboxTar()
	if err != nil {
		w.t.Fatal(err)
	}
	w.conex("import", "-c", `CMD ["sh"]`, image, "busybox")
	w.write("ctx/greeting", "hello from a file\n")
	dir := w.write("ctx/Dockerfile", "FROM busybox\nCOPY greeting /greeting\nLABEL of=archives\nCMD [\"cat\", \"/greeting\"]\n")
	w.conex("build", "-q", "-t", "greeter", dir)
	return w.conex("inspect", "-f", "{{.Id}}", "greeter")
}

const greeting = "hello from a file"

// greets checks that conex has the image and that it runs.
func (w *world) greets(name, id string) {
	w.t.Helper()
	if got := w.conex("inspect", "-f", "{{.Id}}", name); got != id {
		w.t.Errorf("%s is %s, want %s", name, got, id)
	}
	if got := w.conex("run", "--rm", "--network", "none", name); got != greeting {
		w.t.Errorf("%s says %q", name, got)
	}
}

// path is a file in the world's scratch folder.
func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// TestArchivesDocker exchanges archives with a daemon of Docker's.
func TestArchivesDocker(t *testing.T) {
	w := newScriptWorld(t)
	docker := w.dockerd()
	id := w.greeter()
	w.conex("tag", "greeter", "example.com/greeter:1")
	w.conex("save", "-o", "c.tar", "greeter", "example.com/greeter:1", "busybox")
	if out := docker.run("load", "-i", "c.tar"); !strings.Contains(out, "Loaded image: greeter:latest\n") || !strings.Contains(out, "Loaded image: example.com/greeter:1\n") {
		t.Errorf("docker load: %s", out)
	}
	if got := docker.run("image", "inspect", "-f", "{{.Id}}", "greeter"); got != id {
		t.Errorf("in docker it is %s, want %s", got, id)
	}
	if got := docker.run("run", "--rm", "--network", "none", "greeter"); got != greeting {
		t.Errorf("docker run: %q", got)
	}
	docker.run("save", "-o", w.path("d.tar"), "greeter", "busybox")
	want := strings.Fields(w.conex("images", "-q", "--no-trunc"))
	w.conex(append([]string{"rmi", "-f"}, want...)...)
	out := strings.Split(w.conex("load", "-i", "d.tar"), "\n")
	if slices.Sort(out); !slices.Equal(out, []string{"Loaded image: busybox:latest", "Loaded image: greeter:latest"}) {
		t.Errorf("load: %q", out)
	}
	w.greets("greeter", id)
}

// TestArchivesPodman exchanges archives of every form with podman.
func TestArchivesPodman(t *testing.T) {
	w := newScriptWorld(t)
	podman := w.podmanPeer()
	id := w.greeter()
	for _, format := range []string{"docker-archive", "oci-archive"} {
		w.conex("save", "--format", format, "-o", "c.tar", "greeter")
		podman.run("load", "-q", "-i", "c.tar")
		if got := podman.run("image", "inspect", "-f", "{{.Id}}", "docker.io/library/greeter"); "sha256:"+got != id {
			t.Errorf("%s: in podman it is %s, want %s", format, got, id)
		}
		if got := podman.run("run", "--rm", "--network", "none", "docker.io/library/greeter"); got != greeting {
			t.Errorf("%s: podman run: %q", format, got)
		}
		podman.run("rmi", "-af")
	}
	podman.run("load", "-q", "-i", "c.tar")
	w.conex("rmi", "greeter")
	for _, format := range []string{"docker-archive", "oci-archive", "docker-dir", "oci-dir"} {
		podman.run("save", "-q", "--format", format, "-o", format, "docker.io/library/greeter")
		name := "greeter"
		out := w.conex("load", "-i", format)
		if format == "docker-dir" {
			name = id // it has no place for a name
		}
		if format == "oci-archive" || format == "oci-dir" || format == "docker-archive" {
			if out != "Loaded image: greeter:latest" {
				t.Errorf("%s: %s", format, out)
			}
		}
		// podman writes OCI's forms with a config of its own making.
		w.greets(name, w.conex("inspect", "-f", "{{.Id}}", name))
		if format == "docker-archive" {
			w.greets(name, id)
		}
		w.conex("rmi", "-f", name)
	}
}

// TestArchivesSkopeo passes archives through skopeo: manifests, configs and layers are the same bytes on both ends.
func TestArchivesSkopeo(t *testing.T) {
	w := newScriptWorld(t)
	skopeo := w.newPeer("skopeo", "--insecure-policy", "--tmpdir", w.dir)
	id := w.greeter()
	w.conex("save", "-o", "c.tar", "greeter", "busybox")
	w.conex("save", "-o", "o.tar", "--format", "oci-archive", "greeter")
	config := w.blobIn("o.tar", id)

	// Out.
	skopeo.run("copy", "docker-archive:c.tar:greeter:latest", "dir:from-docker")
	skopeo.run("copy", "oci-archive:o.tar:latest", "dir:from-oci")
	for _, dir := range []string{"from-docker", "from-oci"} {
		if got, err := os.ReadFile(w.path(dir + "/" + strings.TrimPrefix(id, "sha256:"))); err != nil || !bytes.Equal(got, config) {
			t.Errorf("%s: the config differs, %v", dir, err)
		}
	}
	manifest := w.topManifest("o.tar")
	if got, err := os.ReadFile(w.path("from-oci/manifest.json")); err != nil || !bytes.Equal(got, w.blobIn("o.tar", manifest)) {
		t.Errorf("the manifest differs, %v", err)
	}

	// And back, with compressed layers, which stay as they are when saved again.
	w.conex("rmi", "-f", "greeter")
	skopeo.run("copy", "docker-archive:c.tar:greeter:latest", "docker-archive:back.tar:greeter:latest")
	if out := w.conex("load", "-i", "back.tar"); out != "Loaded image: greeter:latest" {
		t.Errorf("load: %s", out)
	}
	w.greets("greeter", id)
	w.conex("rmi", "-f", "greeter", "busybox")
	skopeo.run("copy", "--dest-compress", "oci-archive:o.tar:latest", "dir:packed")
	skopeo.run("copy", "dir:packed", "oci-archive:packed.tar:greeter:2")
	for _, from := range []string{"packed", "packed.tar"} {
		w.conex("load", "-i", from)
		w.greets(id, id)
		name := id
		if from == "packed.tar" {
			name = "greeter:2"
		}
		r := w.try("save", "--format", "oci-archive", "-o", "again.tar", name)
		if r.code != 0 || r.stderr != "" {
			t.Errorf("%s: save: %d %s", from, r.code, r.stderr)
		}
		want, err := os.ReadFile(w.path("packed/manifest.json"))
		if from == "packed.tar" { // of OCI's media types
			want, err = w.blobIn("packed.tar", w.topManifest("packed.tar")), nil
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := w.blobIn("again.tar", w.topManifest("again.tar")); !bytes.Equal(got, want) {
			t.Errorf("%s: the manifest is\n%s\nwant\n%s", from, got, want)
		}
		skopeo.run("copy", "oci-archive:again.tar", "dir:again-"+from)
		w.conex("rmi", "-f", id)
	}
}

// TestArchivesUmoci unpacks an archive with umoci, changes the image with it, and loads that.
func TestArchivesUmoci(t *testing.T) {
	w := newScriptWorld(t)
	umoci := w.newPeer("umoci")
	w.greeter()
	w.conex("save", "-o", "o.tar", "--format", "oci-archive", "greeter")
	layout := w.untar("o.tar", "layout")
	umoci.run("unpack", "--image", layout+":latest", w.path("bundle"))
	if got, err := os.ReadFile(w.path("bundle/rootfs/greeting")); err != nil || string(got) != greeting+"\n" {
		t.Errorf("%q, %v", got, err)
	}
	umoci.run("insert", "--image", layout+":latest", "--tag", "changed", w.path("ctx/Dockerfile"), "/Dockerfile")
	w.conex("rmi", "-f", "greeter", "busybox")
	out := w.conex("load", "-i", layout)
	lines := strings.Split(out, "\n")
	if len(lines) != 2 || lines[0] != "Loaded image: greeter:latest" || !strings.HasPrefix(lines[1], "Loaded image ID: sha256:") {
		t.Fatalf("load: %s", out) // umoci names a tag without a repository
	}
	if got := w.conex("run", "--rm", "--network", "none", strings.TrimPrefix(lines[1], "Loaded image ID: "), "sh", "-c", "cat /greeting; head -n 1 /Dockerfile"); got != greeting+"\nFROM busybox" {
		t.Errorf("the changed image says %q", got)
	}
}

// TestArchivesPulled saves a pulled image: manifest, config and layers are the registry's bytes, also after a load elsewhere.
func TestArchivesPulled(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	r := w.try("save", "--format", "oci-archive", "-o", "a.tar", "busybox")
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("save: %d %s", r.code, r.stderr)
	}
	layout, err := layoutOnce()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	w.members("a.tar", func(name string, content []byte) {
		if !strings.HasPrefix(name, "blobs/") {
			return
		}
		n++
		if want, err := os.ReadFile(filepath.Join(layout, name)); err != nil || !bytes.Equal(content, want) {
			t.Errorf("%s is not what the registry has, %v", name, err)
		}
	})
	if n < 3 {
		t.Errorf("%d blobs", n)
	}
	w.conex("rmi", "busybox")
	w.conex("load", "-i", "a.tar")
	w.conex("save", "--format", "oci-archive", "-o", "b.tar", "busybox")
	if a, b := w.read("a.tar"), w.read("b.tar"); !bytes.Equal(a, b) {
		t.Error("saved after a load it is another archive")
	}
	if got := w.conex("run", "--rm", "--network", "none", "busybox", "echo", "runs"); got != "runs" {
		t.Errorf("got %q", got)
	}
}

// TestArchivesKilled kills load and save at random moments: nothing of it is left, and the next one works.
func TestArchivesKilled(t *testing.T) {
	w := newScriptWorld(t)
	w.greeter()
	w.conex("rmi", "greeter")
	big := bytes.Repeat([]byte("0123456789abcdef"), 2<<20)
	for i := range 3 {
		big[i<<20]++
		w.write(fmt.Sprintf("ctx/big%d", i), string(big))
	}
	dir := w.write("ctx/Dockerfile", "FROM busybox\nCOPY big0 /\nCOPY big1 /\nCOPY big2 /\nCOPY greeting /greeting\nCMD [\"cat\", \"/greeting\"]\n")
	w.conex("build", "-q", "-t", "greeter", dir)
	id := w.conex("inspect", "-f", "{{.Id}}", "greeter")
	began := time.Now()
	w.conex("save", "-o", "c.tar", "greeter")
	whole := time.Since(began)
	w.conex("rmi", "-f", "greeter", "busybox")
	w.conex("builder", "prune", "-af")
	for i := range 12 {
		args := []string{"load", "-q", "-i", "c.tar"}
		if i%2 == 1 {
			args = []string{"load", "-q"}
		}
		cmd := w.command(args...)
		if i%2 == 1 {
			f, err := os.Open(w.path("c.tar"))
			if err != nil {
				t.Fatal(err)
			}
			pr, pw := io.Pipe()
			go func() { // ends with the command, which no longer reads
				io.Copy(pw, f)
				pw.Close()
				f.Close()
			}()
			cmd.Stdin = pr
			defer pr.Close()
		}
		w.start(cmd)
		time.Sleep(whole * time.Duration(i) / 12)
		cmd.Process.Kill()
		if cmd.Stdin != nil {
			cmd.Stdin.(*io.PipeReader).Close()
		}
		cmd.Wait()
	}
	w.conex("load", "-i", "c.tar")
	w.greets("greeter", id)
	for i := range 8 {
		cmd := w.command("save", "-o", "killed.tar", "greeter")
		w.start(cmd)
		time.Sleep(whole * time.Duration(i) / 12)
		cmd.Process.Kill()
		if err := cmd.Wait(); err == nil {
			break // it was done before
		}
		if left, err := filepath.Glob(w.path(".*killed*")); err != nil || len(left) > 0 {
			t.Errorf("left %v, %v", left, err)
		}
		if _, err := os.Stat(w.path("killed.tar")); !errors.Is(err, os.ErrNotExist) {
			if !bytes.Equal(w.read("killed.tar"), w.read("c.tar")) {
				t.Error("half an archive has the name of a whole one")
			}
			os.Remove(w.path("killed.tar"))
		}
	}
	w.conex("rmi", "-f", "greeter")
	for _, dir := range []string{"staging", "layers", "downloads", "blobs/sha256"} {
		if left, err := os.ReadDir(filepath.Join(w.root, dir)); err == nil && len(left) > 0 {
			t.Errorf("%s holds %v", dir, left)
		}
	}
}

// TestArchivesInterrupted ends load and save by Ctrl-C: code 130, no message, nothing left, also while nobody writes to the pipe.
func TestArchivesInterrupted(t *testing.T) {
	w := newScriptWorld(t)
	w.greeter()
	archive := []byte(w.conex("save", "greeter"))
	w.conex("rmi", "-f", "greeter", "busybox")
	w.conex("builder", "prune", "-af")
	for _, args := range [][]string{{"load"}, {"import", "-"}} {
		for _, n := range []int{0, 100, len(archive) / 2} {
			cmd := w.command(args...)
			pr, pw, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			var errb bytes.Buffer
			cmd.Stdin, cmd.Stderr = pr, &errb
			w.start(cmd)
			if _, err := pw.Write(archive[:n]); err != nil { // returns when it reads
				t.Fatal(err)
			}
			w.eventually("the command waits for input", func() bool {
				tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/wchan", cmd.Process.Pid))
				return slices.ContainsFunc(tasks, func(name string) bool {
					wchan, _ := os.ReadFile(name)
					return bytes.Contains(wchan, []byte("poll")) && !bytes.Contains(wchan, []byte("ep_poll"))
				})
			})
			cmd.Process.Signal(os.Interrupt)
			cmd.Wait()
			pr.Close()
			pw.Close()
			if code := cmd.ProcessState.ExitCode(); code != 130 || strings.Contains(errb.String(), "conex:") {
				t.Errorf("%v after %d bytes: exit code %d, %s", args, n, code, errb.String())
			}
		}
	}
	for _, dir := range []string{"staging", "layers", "downloads", "blobs/sha256"} {
		if left, err := os.ReadDir(filepath.Join(w.root, dir)); err == nil && len(left) > 0 {
			t.Errorf("%s holds %v", dir, left)
		}
	}
}

// newScriptWorld is a world without a mirror, in a network namespace of its own.
func newScriptWorld(t *testing.T) *world {
	t.Helper()
	w := bareWorld(t)
	w.netns = newNetns(t)
	return w
}

func (w *world) read(name string) []byte {
	w.t.Helper()
	b, err := os.ReadFile(w.path(name))
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// members calls fn for every file of a tar.
func (w *world) members(name string, fn func(name string, content []byte)) {
	w.t.Helper()
	r := tar.NewReader(bytes.NewReader(w.read(name)))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			w.t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			w.t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			fn(h.Name, content)
		}
	}
}

// blobIn returns a blob of an archive.
func (w *world) blobIn(archive, digest string) (found []byte) {
	w.t.Helper()
	w.members(archive, func(name string, content []byte) {
		if name == "blobs/sha256/"+strings.TrimPrefix(digest, "sha256:") {
			found = content
		}
	})
	if found == nil {
		w.t.Fatalf("%s has no blob %s", archive, digest)
	}
	return found
}

// topManifest returns the digest that an archive's index.json leads to.
func (w *world) topManifest(archive string) string {
	w.t.Helper()
	var idx struct{ Manifests []struct{ Digest string } }
	w.members(archive, func(name string, content []byte) {
		if name == "index.json" {
			if err := json.Unmarshal(content, &idx); err != nil {
				w.t.Fatal(err)
			}
		}
	})
	if len(idx.Manifests) != 1 {
		w.t.Fatalf("%s: %d manifests", archive, len(idx.Manifests))
	}
	return idx.Manifests[0].Digest
}

// untar unpacks an archive of plain files into a folder.
func (w *world) untar(archive, dir string) string {
	w.t.Helper()
	w.members(archive, func(name string, content []byte) { w.write(filepath.Join(dir, name), string(content)) })
	return w.path(dir)
}

// podmanPeer is podman with folders of its own.
func (w *world) podmanPeer() *peer {
	w.t.Helper()
	run, err := os.MkdirTemp("/run", "podman-test.") // it takes no long name
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		unmountBelow(w.t, run)
		if err := os.RemoveAll(run); err != nil {
			w.t.Error(err)
		}
	})
	p := w.newPeer("podman", "--root", w.path("podman/data"), "--runroot", run, "--tmpdir", w.path("podman/tmp"), "--storage-driver", "vfs",
		"--cgroup-manager", "cgroupfs", "--network-config-dir", w.path("podman/net"))
	conf := "[containers]\ndefault_ulimits=[]\n[engine]\nevents_logger=\"file\"\n"
	if _, err := exec.LookPath("runc"); err == nil {
		conf += "runtime=\"runc\"\n" // of crun there are versions that refuse both hierarchies of cgroups at once
	}
	w.write("podman/containers.conf", conf)
	w.write("podman/policy.json", `{"default":[{"type":"insecureAcceptAnything"}]}`)
	p.env = []string{"CONTAINERS_CONF=" + w.path("podman/containers.conf"), "TMPDIR=" + w.dir}
	w.t.Cleanup(func() {
		p.try("rm", "-af")
		unmountBelow(w.t, w.path("podman"))
	})
	if _, err := p.try("info"); err != nil {
		w.t.Skipf("podman does not work here: %v", err)
	}
	return p
}

// dockerd starts a daemon of Docker's in the world's network namespace, with folders of its own.
func (w *world) dockerd(more ...string) *peer {
	w.t.Helper()
	daemon, err := exec.LookPath("dockerd")
	if err != nil {
		w.t.Skip("dockerd is not installed; make does not install it, since it would start and close the machine's FORWARD chain")
	}
	p := w.newPeer("docker", "-H", "unix://"+w.path("docker/sock"))
	if err := os.Mkdir(w.path("docker"), 0o755); err != nil {
		w.t.Fatal(err)
	}
	log, err := os.Create(w.path("docker/log"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer log.Close()
	// Its containerd's sockets lie below: a path of more than 107 bytes, as one with a test's name in it, is none for a socket.
	short, err := os.MkdirTemp("/run", "dockerd-test.")
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.Command(daemon, append([]string{"--data-root", w.path("docker/data"), "--exec-root", short, "-H", "unix://" + w.path("docker/sock"), "--pidfile", w.path("docker/pid")}, more...)...)
	cmd.Stdout, cmd.Stderr = log, log
	// In a namespace of its own: its bridge and tables are none of ours.
	netns := newNetns(w.t)
	defer netns.Close()
	err = onThread(func() error {
		if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return cmd.Start()
	})
	if err != nil {
		w.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	w.t.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		<-ended
		unmountBelow(w.t, w.path("docker"))
		unmountBelow(w.t, short)
		if err := os.RemoveAll(short); err != nil {
			w.t.Error(err)
		}
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err = p.try("info"); err == nil {
			return p
		}
		select {
		case err = <-ended:
			ended <- err
		default:
			if time.Now().Before(deadline) {
				continue
			}
		}
		tail, _ := os.ReadFile(log.Name())
		w.t.Skipf("dockerd does not work here: %v\n%s", err, tail[max(0, len(tail)-500):])
	}
}

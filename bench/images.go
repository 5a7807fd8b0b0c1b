package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"conex/internal/compress"
)

// The registries that hold and take the big image; each engine has its own in its network namespace.
const (
	bigRegistry  = "127.0.0.1:5001"
	pushRegistry = "127.0.0.1:5002"
)

// bigMemory is the aim for peak memory with the big image, in MB.
const bigMemory = 120

// imageMeasurements are those with the big image: 10 layers, 15,000 files, 512 MB, 243 MB as gzip.
func imageMeasurements() []measurement {
	gzip := bigRegistry + "/" + bigName + ":gzip"
	forget := func(e *engine) error { return e.do("rmi", "-f", gzip) }
	pull := func(kind compress.Kind) func(*bench, *engine, int) (float64, error) {
		return withBig(func(b *bench, e *engine, _ int) (float64, error) {
			ref := bigRegistry + "/" + bigName + ":" + string(kind)
			v, err := e.timed(e.transfer("pull", "-q", ref)...)
			return then(v, err, func() error { return e.do("rmi", "-f", ref) })
		})
	}
	ms := []measurement{
		{name: "image-pull-gzip", target: 2500, once: pull(compress.Gzip)},
		{name: "image-pull-zstd", target: 1700, once: pull(compress.Zstd)},
		{name: "image-pull-again", target: 30, once: withBig(func(b *bench, e *engine, i int) (float64, error) {
			if i == 0 {
				if err := e.do(e.transfer("pull", "-q", gzip)...); err != nil {
					return 0, err
				}
			}
			v, err := e.timed(e.transfer("pull", "-q", gzip)...)
			if err != nil || i == b.bigRounds() {
				return then(v, err, func() error { return forget(e) })
			}
			return v, nil
		})},
		{name: "image-rmi", target: 50, once: withBig(func(b *bench, e *engine, i int) (float64, error) {
			if err := e.do(e.transfer("pull", "-q", gzip)...); err != nil {
				return 0, err
			}
			b.settle()
			return e.timed("rmi", "-f", gzip)
		})},
		{name: "image-load", target: 2000, once: withBig(func(b *bench, e *engine, i int) (float64, error) {
			v, err := e.timed("load", "-q", "-i", b.image.archive)
			return then(v, err, func() error { return e.do("rmi", "-f", bigName) })
		})},
		{name: "image-save", target: 1500, once: withLoaded(func(b *bench, e *engine) (float64, error) {
			out := filepath.Join(e.dir, "saved.tar")
			v, err := e.timed("save", "-o", out, bigName)
			return then(v, err, func() error { return os.Remove(out) })
		})},
		{name: "image-push-gzip", target: 4000, once: withLoaded(push(compress.Gzip, (*engine).timed))},
		{name: "image-push-zstd", target: 2000, once: withLoaded(push(compress.Zstd, (*engine).timed))},
		{name: "image-pull-memory", target: bigMemory, memory: true, once: withBig(func(b *bench, e *engine, i int) (float64, error) {
			v, err := e.peak(e.transfer("pull", "-q", gzip)...)
			return then(v, err, func() error { return forget(e) })
		})},
		{name: "image-load-memory", target: bigMemory, memory: true, once: withBig(func(b *bench, e *engine, i int) (float64, error) {
			v, err := e.peak("load", "-q", "-i", b.image.archive)
			return then(v, err, func() error { return e.do("rmi", "-f", bigName) })
		})},
		{name: "image-push-memory", target: bigMemory, memory: true, once: withLoaded(push(compress.Gzip, (*engine).peak))},
		{name: "image-disk", memory: true, once: withBig(func(b *bench, e *engine, i int) (float64, error) {
			// An engine may still be at what it was told to remove.
			before, err := e.disk()
			for err == nil {
				time.Sleep(200 * time.Millisecond)
				was := before
				if before, err = e.disk(); before == was {
					break
				}
			}
			if err != nil {
				return 0, err
			}
			if err := e.do(e.transfer("pull", "-q", gzip)...); err != nil {
				return 0, err
			}
			after, err := e.disk()
			return then(after-before, err, func() error { return forget(e) })
		})},
	}
	for i := range ms {
		ms[i].rounds = bigRounds
		if ms[i].memory {
			ms[i].rounds = 1
		}
	}
	return ms
}

const bigRounds = 3

func (b *bench) bigRounds() int { return min(b.rounds, bigRounds) }

// withBig makes the big image and the engine's registry before the first round, and waits for what others have left to write.
func withBig(once func(*bench, *engine, int) (float64, error)) func(*bench, *engine, int) (float64, error) {
	return func(b *bench, e *engine, i int) (float64, error) {
		if b.image == nil {
			dir := filepath.Join(b.dir, "big")
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return 0, err
			}
			img, err := writeBig(dir)
			if err != nil {
				return 0, err
			}
			if err := img.seed(filepath.Join(dir, "registry")); err != nil {
				return 0, err
			}
			b.image = img
		}
		if e.bigRegistry == nil {
			r, err := e.startRegistry(bigRegistry, filepath.Join(b.dir, "big", "registry"), b.image.layout)
			if err != nil {
				return 0, err
			}
			e.bigRegistry = r
		}
		b.settle()
		return once(b, e, i)
	}
}

// withLoaded is withBig, with the image loaded from its archive.
func withLoaded(once func(*bench, *engine) (float64, error)) func(*bench, *engine, int) (float64, error) {
	return withBig(func(b *bench, e *engine, _ int) (float64, error) {
		if err := e.do("load", "-q", "-i", b.image.archive); err != nil {
			return 0, err
		}
		b.settle()
		v, err := once(b, e)
		return then(v, err, func() error { return e.do("rmi", "-f", bigName) })
	})
}

// push measures a push of the loaded image, whose layers nobody has compressed, to an empty registry.
func push(kind compress.Kind, measure func(e *engine, args ...string) (float64, error)) func(*bench, *engine) (float64, error) {
	return func(b *bench, e *engine) (float64, error) {
		var flags []string
		switch {
		case e.name == "conex":
			flags = []string{"--compression", string(kind)}
		case e.name == "podman":
			flags = []string{"--compression-format", string(kind)}
		case kind != compress.Gzip:
			return 0, fmt.Errorf("push: can't compress with %s", kind)
		}
		root := filepath.Join(e.dir, "pushed")
		r, err := e.startRegistry(pushRegistry, root, "")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(root)
		defer r.stop()
		ref := pushRegistry + "/" + bigName + ":" + string(kind)
		if err := e.do("tag", bigName, ref); err != nil {
			return 0, err
		}
		v, err := measure(e, e.transfer("push", append(append([]string{"-q"}, flags...), ref)...)...)
		return then(v, err, func() error { return e.do("rmi", ref) })
	}
}

// transfer is a pull or push, from and to a registry without TLS.
func (e *engine) transfer(command string, args ...string) []string {
	if e.name == "podman" {
		args = append([]string{"--tls-verify=false"}, args...)
	}
	return append([]string{command}, args...)
}

// settle writes what is dirty, so that one engine's writes don't fall into another one's time.
func (b *bench) settle() { unix.Sync() }

// registryProcess is a registry at work.
type registryProcess struct {
	cmd    *exec.Cmd
	server *http.Server // instead of cmd, in this process
}

func (r *registryProcess) stop() error {
	if r == nil {
		return nil
	}
	if r.server != nil {
		return r.server.Close()
	}
	err := r.cmd.Process.Signal(syscall.SIGTERM)
	if werr := r.cmd.Wait(); werr != nil && !errors.As(werr, new(*exec.ExitError)) {
		err = errors.Join(err, werr)
	}
	return err
}

// startRegistry starts Debian's docker-registry over root in the engine's network namespace. Where it is not installed, conex's own
// mirror serves the layout, if one is given; it takes no pushes.
func (e *engine) startRegistry(addr, root, layout string) (*registryProcess, error) {
	program, err := exec.LookPath("docker-registry")
	if err != nil && layout != "" {
		server, err := e.serveLayout(layout, addr)
		return &registryProcess{server: server}, err
	}
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	conf := filepath.Join(e.dir, "registry-"+strings.ReplaceAll(addr, ":", "-")+".yml")
	text := "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: " + root + "}}\n" +
		"http: {addr: \"" + addr + "\", secret: bench}\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command(program, "serve", conf)
	if err := e.inNetns(cmd.Start); err != nil {
		return nil, err
	}
	r := &registryProcess{cmd: cmd}
	for range 500 {
		err = e.inNetns(func() error {
			c, err := net.Dial("tcp", addr)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			return r, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, errors.Join(fmt.Errorf("docker-registry does not answer: %w", err), r.stop())
}

// peak runs the engine's command and returns how much memory the process had at most, in MB: the daemon's, where there is one.
func (e *engine) peak(args ...string) (float64, error) {
	if e.daemon != nil {
		dir := fmt.Sprintf("/proc/%d/", e.daemon.Process.Pid)
		if err := os.WriteFile(dir+"clear_refs", []byte("5"), 0); err != nil { // the peak begins anew
			return 0, err
		}
		if err := e.do(args...); err != nil {
			return 0, err
		}
		kb, err := peakKB(dir + "status")
		return float64(kb) / 1024, err
	}
	// The peak is gone with the process, and what wait4 tells counts the forking parent's memory too: so ask while it runs.
	cmd := e.command(args...)
	started, done := make(chan int, 1), make(chan int, 1)
	go func() {
		most := 0
		for pid := range started {
			status := fmt.Sprintf("/proc/%d/status", pid)
			for {
				kb, err := peakKB(status)
				if err != nil || kb == 0 {
					break
				}
				most = max(most, kb)
				time.Sleep(2 * time.Millisecond)
			}
		}
		done <- most
	}()
	err := e.runStarted(cmd, func() { started <- cmd.Process.Pid })
	close(started)
	return float64(<-done) / 1024, err
}

// peakKB reads VmHWM, in KiB; 0 when the process has ended.
func peakKB(status string) (int, error) {
	data, err := os.ReadFile(status)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmHWM:" {
			return strconv.Atoi(f[1])
		}
	}
	return 0, nil
}

// disk is what the engine's data takes on the disk, in MB: blocks of files and folders, each once.
func (e *engine) disk() (float64, error) {
	unix.Sync() // blocks are counted once they are allocated
	var top unix.Stat_t
	if err := unix.Lstat(e.dir, &top); err != nil {
		return 0, err
	}
	seen := map[uint64]bool{}
	var blocks int64
	err := filepath.WalkDir(e.dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return nil // removed meanwhile
		}
		if st.Dev != top.Dev { // a mount
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			blocks += st.Blocks
		}
		return nil
	})
	return float64(blocks) * 512 / 1e6, err
}

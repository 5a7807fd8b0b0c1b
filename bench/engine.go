package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/network"
	"conex/test/mirror"
)

// engine is one installed engine with data and a network namespace of its own.
type engine struct {
	name  string
	argv  []string // program and global flags
	env   []string
	dir   string
	run   string // what a reboot clears: a tmpfs, as /run is on every distribution
	netns *os.File
	// registry is the address of a registry in the engine's network namespace.
	registry string
	server   *http.Server
	daemon   *exec.Cmd
	// base are the flags of a build that name the base image, where the engine has no images of its own.
	base []string
	// bigRegistry has the big image.
	bigRegistry *registryProcess
	// helpers returns the process ids of what the engine keeps for the container.
	helpers func(id string) []int
}

// open makes the engines that are here.
func (b *bench) open(conex string, peers []string) error {
	for _, name := range append([]string{"conex"}, peers...) {
		program := name
		switch name {
		case "conex":
			program = conex
		case "buildkit":
			program = "buildctl"
		}
		path, err := exec.LookPath(program)
		if err != nil {
			if name == "conex" {
				return err
			}
			if name != "" {
				fmt.Fprintf(os.Stderr, "%s is not installed, left out\n", name)
			}
			continue
		}
		e := &engine{name: name, argv: []string{path}, dir: filepath.Join(b.dir, name), env: os.Environ()}
		e.env = slices.DeleteFunc(e.env, func(v string) bool {
			return strings.HasPrefix(v, "CONEX_") || strings.HasPrefix(v, "DOCKER_") || strings.HasPrefix(v, "CONTAINERS_")
		})
		if err := os.MkdirAll(e.dir, 0o755); err != nil {
			return err
		}
		if e.netns, err = newNetns(); err != nil {
			return err
		}
		b.engines = append(b.engines, e)
		if err := e.openRun(); err != nil {
			return err
		}
		switch name {
		case "conex":
			err = e.openConex()
		case "docker":
			err = e.openDocker()
		case "podman":
			err = e.openPodman()
		case "buildkit":
			err = e.openBuildkit()
		default:
			err = fmt.Errorf("unknown peer %q", name)
		}
		if err != nil {
			if name == "conex" {
				return err
			}
			fmt.Fprintf(os.Stderr, "%s can't be used here, left out: %v\n", name, err)
			b.engines = b.engines[:len(b.engines)-1]
			if err := e.close(); err != nil {
				return err
			}
		}
	}
	return nil
}

// openRun makes the folder for what a reboot clears.
func (e *engine) openRun() error {
	dir, err := os.MkdirTemp("/run", "bench-"+e.name+".")
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return errors.Join(fmt.Errorf("mount a tmpfs at %s: %w", dir, err), os.Remove(dir))
	}
	e.run = dir
	return nil
}

func (e *engine) closeRun() error {
	if e.run == "" {
		return nil
	}
	return errors.Join(unmountBelow(e.run), unix.Unmount(e.run, unix.MNT_DETACH), os.Remove(e.run))
}

func (e *engine) openConex() error {
	state := e.run
	e.env = append(e.env, "CONEX_ROOT="+e.dir+"/root", "CONEX_STATE="+state, "CONEX_CONFIG="+e.dir+"/config.toml")
	e.helpers = func(id string) []int {
		return processes(func(pid int, _ []byte) bool { return holdsFile(pid, filepath.Join(state, "c", id)) })
	}
	return nil
}

func (e *engine) openDocker() error {
	dockerd, err := exec.LookPath("dockerd")
	if err != nil {
		return err
	}
	sock := filepath.Join(e.dir, "sock")
	log, err := os.Create(filepath.Join(e.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	if err := e.startDaemon(log, dockerd, "--data-root", e.dir+"/data", "--exec-root", e.run, "-H", "unix://"+sock, "--pidfile", e.dir+"/pid"); err != nil {
		return err
	}
	// The old builder: every dockerd has it, and no plugin is needed.
	e.env = append(e.env, "DOCKER_HOST=unix://"+sock, "DOCKER_BUILDKIT=0")
	e.helpers = byID
	return e.answers(log, "info")
}

// openBuildkit starts a buildkitd of our own. Its RUN steps get the daemon's network, which saves it the work of making one.
func (e *engine) openBuildkit() error {
	buildkitd, err := exec.LookPath("buildkitd")
	if err != nil {
		return err
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(e.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	addr := "unix://" + filepath.Join(e.dir, "sock")
	e.argv = append(e.argv, "--addr", addr)
	conf := filepath.Join(e.dir, "buildkitd.toml")
	if err := os.WriteFile(conf, nil, 0o644); err != nil {
		return err
	}
	if err := e.startDaemon(log, buildkitd, "--config", conf, "--root", e.dir+"/data", "--addr", addr, "--otel-socket-path", e.dir+"/otel",
		"--containerd-worker=false", "--oci-worker-net", "host", "--oci-worker-binary", runc); err != nil {
		return err
	}
	return e.answers(log, "debug", "workers")
}

// useBase gives an engine without images the base image, as a layout that each build names.
func (e *engine) useBase(tar string) error {
	dir := filepath.Join(e.dir, "base")
	digest, err := writeImage(dir, image, func(w io.Writer) error {
		f, err := os.Open(tar)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
	e.base = []string{"--oci-layout", "base=" + dir, "--opt", "context:" + image + "=oci-layout://base@" + digest}
	return err
}

// startDaemon starts the engine's daemon in its network namespace.
func (e *engine) startDaemon(log *os.File, argv ...string) error {
	e.daemon = exec.Command(argv[0], argv[1:]...)
	e.daemon.Stdout, e.daemon.Stderr = log, log
	e.daemon.Env = e.env
	err := e.inNetns(e.daemon.Start)
	if err != nil {
		e.daemon = nil
	}
	return err
}

// answers waits until the daemon answers a command.
func (e *engine) answers(log *os.File, args ...string) (err error) {
	for range 300 {
		if err = e.do(args...); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	tail, _ := os.ReadFile(log.Name())
	return fmt.Errorf("the daemon does not answer: %w\n%s", err, tail[max(0, len(tail)-500):])
}

func (e *engine) openPodman() error {
	conf := filepath.Join(e.dir, "containers.conf")
	text := "[containers]\ndefault_ulimits=[]\n[engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\n"
	if _, err := exec.LookPath("runc"); err == nil {
		text += "runtime=\"runc\"\n"
	}
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return err
	}
	e.env = append(e.env, "CONTAINERS_CONF="+conf)
	e.argv = append(e.argv, "--root", e.dir+"/data", "--runroot", e.run+"/run", "--tmpdir", e.run+"/tmp", "--storage-driver", "overlay",
		"--network-config-dir", e.dir+"/net")
	e.helpers = byID
	return e.do("info")
}

// serve gives the engine a registry with the layout's images in its network namespace.
func (e *engine) serve(layout string) (err error) {
	e.registry = "127.0.0.1:5000"
	e.server, err = e.serveLayout(layout, e.registry)
	return err
}

func (e *engine) serveLayout(layout, addr string) (*http.Server, error) {
	h, err := mirror.Handler(layout, nil)
	if err != nil {
		return nil, err
	}
	var l net.Listener
	err = e.inNetns(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: h}
	go server.Serve(l) // ends with Close
	return server, nil
}

// close removes the engine's containers, ends its daemon, and takes down its mounts and network.
func (e *engine) close() error {
	var errs []error
	if e.name != "buildkit" {
		if out, err := e.output("ps", "-aq"); err == nil && out != "" {
			errs = append(errs, e.remove(strings.Fields(out)...))
		}
	}
	if e.name == "conex" {
		errs = append(errs, e.closeConex())
	}
	if e.server != nil {
		errs = append(errs, e.server.Close())
	}
	errs = append(errs, e.bigRegistry.stop())
	if e.daemon != nil {
		errs = append(errs, e.daemon.Process.Signal(syscall.SIGTERM))
		if err := e.daemon.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, unmountBelow(e.dir), e.closeRun())
	if e.netns != nil {
		errs = append(errs, e.netns.Close())
	}
	return errors.Join(errs...)
}

func (e *engine) closeConex() error {
	root, err := disk.OpenRoot(e.dir + "/root")
	if err != nil {
		return err
	}
	return e.inNetns(func() error { return network.Open(root, e.run).Cleanup(context.Background()) })
}

// runCommand runs cmd in the engine's network namespace; a failure shows what it wrote.
func (e *engine) runCommand(cmd *exec.Cmd) error { return e.runStarted(cmd, func() {}) }

// runStarted is runCommand, which tells when cmd has started.
func (e *engine) runStarted(cmd *exec.Cmd, started func()) error {
	var out bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	cmd.Stderr = &out
	if err := e.inNetns(cmd.Start); err != nil {
		return err
	}
	started()
	if err := cmd.Wait(); err != nil {
		text := strings.TrimSpace(out.String())
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args[len(e.argv):], " "), err, text[max(0, len(text)-300):])
	}
	return nil
}

func (e *engine) output(args ...string) (string, error) {
	var out bytes.Buffer
	cmd := e.command(args...)
	cmd.Stdout = &out
	err := e.runCommand(cmd)
	return strings.TrimSpace(out.String()), err
}

// rm is the command line that kills and removes containers. podman would first wait ten seconds for a process 1 that ignores
// SIGTERM, which the others don't.
func (e *engine) rm(names ...string) []string {
	args := []string{"rm", "-f"}
	if e.name == "podman" {
		args = append(args, "-t", "0")
	}
	return append(args, names...)
}

func (e *engine) remove(names ...string) error {
	if len(names) == 0 {
		return nil
	}
	return e.do(e.rm(names...)...)
}

// newNetns makes a network namespace with its loopback device up.
func newNetns() (*os.File, error) {
	var f *os.File
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			return fmt.Errorf("bring lo up: %w", err)
		}
		f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return f, err
}

// onThread runs fn on a thread of its own, which dies afterwards with whatever fn did to its namespaces.
func onThread(fn func() error) error {
	errc := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		errc <- fn()
	}()
	return <-errc
}

// inNetns runs fn in the engine's network namespace; processes that fn starts are in it too.
func (e *engine) inNetns(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(e.netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// processes lists the ids of the processes that match.
func processes(match func(pid int, cmdline []byte) bool) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		var pid int
		fmt.Sscan(filepath.Base(d), &pid)
		cmdline, err := os.ReadFile(d + "/cmdline")
		if err == nil && len(cmdline) > 0 && pid != os.Getpid() && match(pid, cmdline) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// byID finds the shim or conmon of a container: it has the id in its command line.
func byID(id string) []int {
	return processes(func(_ int, cmdline []byte) bool { return bytes.Contains(cmdline, []byte(id)) })
}

// holdsFile says whether the process has a file below dir open.
func holdsFile(pid int, dir string) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return slices.ContainsFunc(fds, func(fd string) bool {
		target, err := os.Readlink(fd)
		return err == nil && strings.HasPrefix(target, dir+"/")
	})
}

// unmountBelow detaches every mount below dir, the last one first.
func unmountBelow(dir string) error {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	lines := strings.Split(string(info), "\n")
	slices.Reverse(lines)
	for _, line := range lines {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", f[4], err))
			}
		}
	}
	return errors.Join(errs...)
}

package monitor

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"

	"conex/internal/container"
	"conex/internal/linux/pidfd"
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// joined are the namespaces of other containers that a run enters, held by descriptors from the look at their owners until the
// process has started.
type joined struct {
	spaces map[specs.LinuxNamespaceType]*os.File
	// shm is the /dev/shm that belongs to the ipc namespace, a detached mount.
	shm *os.File
	// files is the folder of hosts, hostname and resolv.conf that goes with the network, "" for the container's own.
	files string
}

func (j *joined) close() {
	for _, f := range j.spaces {
		f.Close()
	}
	if j.shm != nil {
		j.shm.Close()
	}
}

// join looks for the containers whose namespaces are wanted, which must run. On an error nothing is open.
func (m *monitor) join() (_ *joined, err error) {
	j := &joined{spaces: map[specs.LinuxNamespaceType]*os.File{}}
	defer func() {
		if err != nil {
			j.close()
		}
	}()
	hc := m.rec.HostConfig
	if id := hc.NetworkMode.ConnectedContainer(); id != "" {
		o, err := m.owner(id)
		if err != nil {
			return nil, err
		}
		if o == nil {
			return nil, fmt.Errorf("cannot join network of a non running container: %s", id)
		}
		defer o.pidfd.Close()
		if err := j.open(o, specs.NetworkNamespace, "net"); err != nil {
			return nil, err
		}
		// Who joins a container that has joined another is there as well.
		for o.rec.HostConfig.NetworkMode.IsContainer() {
			if o.rec, err = m.store.Load(o.rec.HostConfig.NetworkMode.ConnectedContainer()); err != nil {
				return nil, err
			}
		}
		j.files = m.store.Dir(o.rec.ID, "files")
	}
	if id := hc.PidMode.Container(); id != "" {
		o, err := m.owner(id)
		if err != nil {
			return nil, err
		}
		if o == nil {
			return nil, fmt.Errorf("cannot join PID namespace: container %s is not running", id)
		}
		defer o.pidfd.Close()
		if err := j.open(o, specs.PIDNamespace, "pid"); err != nil {
			return nil, err
		}
	}
	if hc.IpcMode.IsContainer() {
		if err := m.joinIPC(j, hc.IpcMode.Container()); err != nil {
			return nil, fmt.Errorf("can't join IPC of container %s: %w", hc.IpcMode.Container(), err)
		}
	}
	return j, nil
}

func (m *monitor) joinIPC(j *joined, id string) error {
	o, err := m.owner(id)
	if err != nil {
		return err
	}
	if o == nil {
		return fmt.Errorf("container %s is not running", id)
	}
	defer o.pidfd.Close()
	if mode := o.rec.HostConfig.IpcMode; !mode.IsShareable() && !mode.IsContainer() {
		return fmt.Errorf("non-shareable IPC (hint: use IpcMode:shareable for the donor container)")
	}
	if err := j.open(o, specs.IPCNamespace, "ipc"); err != nil {
		return err
	}
	j.shm, err = runtime.MountOf(o.pidfd, "/dev/shm")
	return err
}

// owner is a running container whose namespaces are wanted.
type owner struct {
	rec   *container.Record
	pid   int
	pidfd *os.File
}

// owner finds a container's first process; nil when there is none.
func (m *monitor) owner(id string) (*owner, error) {
	rec, err := m.store.Load(id)
	if err != nil {
		return nil, err
	}
	st, err := m.store.State(id)
	if err != nil || st == nil || st.Status != container.Running || st.Pid == 0 {
		return nil, err
	}
	f, err := pidfd.Open(st.Pid)
	if err != nil {
		return nil, nil //nolint:nilerr // it has ended just now
	}
	// The number could be another process's by now, and what the state says old. Its parent tells: no other process is a child of
	// that monitor.
	if parent(st.Pid) != st.Monitor || pidfd.SendSignal(f, 0) != nil {
		f.Close()
		return nil, nil
	}
	return &owner{rec, st.Pid, f}, nil
}

// parent returns the parent of a process, 0 when it is gone.
func parent(pid int) int {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	// The command's name, in parentheses, may hold anything (proc_pid_stat(5)).
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 2 {
		return 0
	}
	n, _ := strconv.Atoi(f[1])
	return n
}

func (j *joined) open(o *owner, kind specs.LinuxNamespaceType, name string) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", o.pid, name))
	if err != nil {
		return fmt.Errorf("join %s namespace of container %s: %w", kind, o.rec.ID, err)
	}
	if err := pidfd.SendSignal(o.pidfd, 0); err != nil { // it ended, and the number may be another's
		f.Close()
		return fmt.Errorf("join %s namespace: container %s is not running", kind, o.rec.ID)
	}
	j.spaces[kind] = f
	return nil
}

// apply puts what is joined into the runtime's description. dir is a folder of the host for the /dev/shm to be shown on; it is made
// when there is one.
func (j *joined) apply(c *runtime.Config, dir string) error {
	for i, ns := range c.Spec.Linux.Namespaces {
		if f := j.spaces[ns.Type]; f != nil {
			// By our number: the runtime may be another process.
			c.Spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
		}
	}
	if j.shm == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for i, m := range c.Spec.Mounts {
		if m.Destination == "/dev/shm" && m.Source == "shm" {
			c.Trees = append(c.Trees, runtime.Tree{Mount: j.shm, Dir: dir})
			c.Spec.Mounts[i] = specs.Mount{Destination: m.Destination, Type: "bind", Source: dir, Options: []string{"bind", "nosuid", "noexec", "nodev"}}
		}
	}
	return nil
}

// Package runtime turns an OCI runtime spec and a stack of mounted layers into a running, isolated process.
//
// The built-in runtime (Builtin) needs no helper binary: a locked thread enters new namespaces and makes the root file system
// with ordinary Go code, then package linux/nsfork forks the container's first process from that thread. Create, Start and
// Exec are separate so that the network is set up while the mounts are made. An external OCI runtime (runc, crun) can
// stand behind the same interface.
package runtime

import (
	"context"
	"errors"
	"os"
	"strconv"
	"syscall"

	"conex/internal/linux/cgroup"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Runtime makes containers. When the ctx of a call ends, an external runtime's command is killed; our own calls take so little time that they end.
type Runtime interface {
	// Create prepares everything that does not depend on the network's being up: cgroup, namespaces, root file system.
	// On error nothing is left behind.
	Create(ctx context.Context, c *Config) (Container, error)
}

// Container is a prepared or running container. Its methods may be called from any goroutine.
type Container interface {
	// NetNS is the network namespace that Create made; nil when the container joins an existing one.
	NetNS() *os.File
	// Cgroup controls the container's resources.
	Cgroup() cgroup.Manager
	// Start executes the spec's process. Exactly once. A command that can't be executed gives an *ExecError.
	Start(ctx context.Context) (Process, error)
	// Exec starts a further process in the running container. A command that can't be executed gives an *ExecError.
	Exec(ctx context.Context, p *ExecConfig) (Process, error)
	// Delete frees whatever Create made: the cgroup (killing what is in it), namespaces, mounts. Idempotent.
	Delete() error
}

// Process is one process in a container that we started, seen from its parent.
type Process interface {
	// Pid is the process's id in our own pid namespace.
	Pid() int
	// Console is the terminal's master side; nil without a terminal. The caller closes it.
	Console() *os.File
	// Signal sends sig to this process only. os.ErrProcessDone when it has ended.
	Signal(sig syscall.Signal) error
	// Wait blocks until the process has ended and been reaped. May be called several times.
	Wait() (ExitStatus, error)
}

// ExitStatus is how a process ended.
type ExitStatus struct {
	// Code is the exit code; 128+Signal for a process that a signal killed.
	Code int
	// Signal is the signal that killed it, 0 if it exited by itself.
	Signal syscall.Signal
}

// Config describes a container to a runtime.
type Config struct {
	// ID names the container; 64 hexadecimal digits as a rule.
	ID string
	// Spec is the OCI runtime spec. With a user namespace in it, RootFS's layers are shown with its ids, RootFS.Dir is not. Root.Path is
	// not used, Hooks only with State; Root.Readonly is. Linux.CgroupsPath is relative to each
	// hierarchy's root, "/conex/<id>"; with SystemdCgroup "slice:prefix:name" (cgroup.Parse).
	Spec *specs.Spec
	// User is Docker's user[:group], by name or number, looked up in the container's own passwd and group files once its
	// root file system stands; it replaces Spec.Process.User's ids. Empty: Spec.Process.User as it is.
	User string
	// GroupAdd are further groups, by name or number.
	GroupAdd []string
	// RootFS is what the root file system is made of.
	RootFS RootFS
	// Stdio are the process's standard streams, without a terminal. Nil entries are /dev/null. The caller closes them.
	Stdio [3]*os.File
	// Trees are detached mounts that Spec.Mounts bind from.
	Trees []Tree
	// Sources say more about bind mounts of the spec, by their destinations.
	Sources map[string]Source
	// Scratch is an existing empty folder on which the root file system is mounted, inside the container's mount namespace only.
	Scratch string
	// SeccompCache is a folder for compiled filters. Empty: compile each time.
	SeccompCache string
	// DefaultSeccomp asks for the default profile (moby's) for the process's bounding capabilities, when Spec.Linux.Seccomp is nil.
	DefaultSeccomp bool
	// DieWithParent kills the container's first process, and all others with it, when this process dies, however it dies.
	DieWithParent bool
	// SystemdCgroup has systemd make the cgroup.
	SystemdCgroup bool
	// Init runs a minimal init as pid 1 that reaps and forwards signals (--init).
	Init bool
	// Exact takes the spec as it stands, as an OCI runtime must: the user and groups by their numbers, sysctls for namespaces that are
	// joined too, device nodes without a mount on /dev. Otherwise Docker's rules complete it.
	Exact bool
	// InCgroup says that the spec's cgroup is another container's: the process goes into it, and nothing of it is made, changed or removed.
	// Delete ends that process alone.
	InCgroup bool
	// Hold keeps the first process from executing its command until it is released; Start returns once it waits.
	Hold *Hold
	// State describes the container to the hooks of the spec that belong to its creation: they run only with it.
	State func(status specs.ContainerState, pid int) *specs.State
	// NoPivot moves the root file system onto / instead of pivot_root(2), for a host whose root is the initial ramdisk.
	NoPivot bool
	// NoKeyring leaves the process in the session keyring of whoever starts it.
	NoKeyring bool
	// PreserveFDs is how many descriptors from 3 on the first process inherits.
	PreserveFDs int
}

// Hold is how a process waits for its start: for one byte from FIFO, a named pipe that is open for reading and writing. While it has
// a reader the process waits. Report is a file for what goes wrong after that, see nsfork.ReadReport.
type Hold struct{ FIFO, Report *os.File }

// RootFS is a stack of read-only layers and one writable one.
type RootFS struct {
	// Lower are the layers' mounted folders, top first, as layers.Store.Lower returns them.
	Lower []string
	// Upper and Work are overlayfs's writable and work folders. Both empty: the root is read-only.
	Upper, Work string
	// Volatile says that nobody mounts Upper again after this: nothing is synced for it.
	Volatile bool
	// UpperAsIs says that what is in Upper has the host's ids, not the image's, where the container has a user namespace.
	UpperAsIs bool
	// Dir replaces all of the above with an existing folder.
	Dir string
}

// Source says of a bind mount what the OCI spec has no words for.
type Source struct {
	// Subpath is a path below the source which is mounted instead of it, resolved inside it.
	Subpath string
	// Lower replaces the source by the merged, read-only view of these layers, top first: an image. In a user namespace it is shown
	// with the container's ids, like the root file system. One layer alone is shown as it is, with its marks of deleted files.
	Lower []string
	// Owner is whom files of the container's user belong to in the source, without any change of owner there.
	Owner *Owner
	// Overlay shows the source, a folder, under what the container changes of it. What is mounted below the source does not show.
	Overlay *Overlay
}

// Overlay are the existing folders that changes are kept in.
type Overlay struct {
	Upper, Work string
	// Volatile is as RootFS's.
	Volatile bool
}

// Owner is a user and a group of the host.
type Owner struct{ UID, GID uint32 }

// Tree is a detached mount, shown on an existing folder of the host before anything else is mounted, in the container's own mount
// namespace alone: nobody outside ever sees it, and it ends with the container. The caller closes Mount once the process was started.
type Tree struct {
	Mount *os.File
	Dir   string
}

// ExecConfig describes a further process.
type ExecConfig struct {
	// Path is the file to execute, where that is not what Process.Args[0] names.
	Path string
	// Process holds Args, Env, Cwd, Terminal, ConsoleSize, Capabilities, NoNewPrivileges as the OCI spec has them.
	Process *specs.Process
	// User is as Config.User.
	User string
	// GroupAdd is as Config.GroupAdd.
	GroupAdd []string
	// Stdio is as Config.Stdio.
	Stdio [3]*os.File
	// Exact takes the process's user as it stands.
	Exact bool
	// PreserveFDs is as Config.PreserveFDs.
	PreserveFDs int
}

// ExecError says that the command itself could not be executed; Docker's exit codes tell why.
type ExecError struct {
	// Path is the command as the user gave it.
	Path string
	// Err is the reason; ErrCommandNotFound, fs.ErrPermission, ENOEXEC and so on are found in it by errors.Is.
	Err error
}

// Error quotes the command, which an image may have filled with a terminal's escape sequences.
func (e *ExecError) Error() string { return "exec: " + strconv.Quote(e.Path) + ": " + e.Err.Error() }

// Unwrap returns the reason.
func (e *ExecError) Unwrap() error { return e.Err }

// ExitCode is what Docker exits with: 127 when there is no such command, 126 when it can't be run.
func (e *ExecError) ExitCode() int {
	if errors.Is(e.Err, ErrCommandNotFound) || errors.Is(e.Err, syscall.ENOENT) {
		return 127
	}
	return 126
}

// ErrCommandNotFound says that no folder in the container's $PATH has the command.
var ErrCommandNotFound = errors.New("executable file not found in $PATH")

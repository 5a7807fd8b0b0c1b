// Package container owns containers/, names/ and the run folders c/<id>/ below the state folder: what a container is made
// of, what it is called, and what state it is in.
//
//	containers/<id>/config.json    Record: what was asked for. Changed by rename only.
//	containers/<id>/desired.json   Desired: whether it should run
//	containers/<id>/exit.json      Exit: how its last run ended
//	containers/<id>/upper,work     the writable layer
//	containers/<id>/overlay/<hex>  upper and work of an overlay mount
//	containers/<id>/log            its output (package logs)
//	containers/<id>/files          hosts, hostname, resolv.conf, bind-mounted into it
//	names/<name> -> <id>           a link counts while that container's record carries that name
//	names.lock                     flock: every change of a name holds it
//	c/<id>/monitor.lock            flock: held by the monitor for life, or by whoever starts, settles or removes the container
//	c/<id>/state.json              State: what the monitor is doing; there from before the start until all is cleaned up
//	c/<id>/sock                    the monitor's socket (package control)
package container

import (
	"bytes"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"
	"conex/internal/portmap"

	apic "github.com/moby/moby/api/types/container"
)

// Record is what a container was created as.
type Record struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	// Image is the image's name as the user gave it; ImageID and Layers (base first) are what it meant at that moment.
	Image   string           `json:"image"`
	ImageID ocispec.Digest   `json:"imageID"`
	Layers  []ocispec.Digest `json:"layers"`
	// Config is the request merged with the image's config.
	Config *apic.Config `json:"config"`
	// HostConfig is the request's.
	HostConfig *apic.HostConfig `json:"hostConfig"`
	// Path and Args are the command: entrypoint and cmd in one.
	Path string   `json:"path"`
	Args []string `json:"args"`
	// Mounts are binds, volumes, images and tmpfs; More says more about some of them, by destination.
	Mounts []apic.MountPoint `json:"mounts,omitempty"`
	More   map[string]Mount  `json:"more,omitempty"`
	// Anonymous names the volumes that were made for this container and go with it on `rm -v` and --rm.
	Anonymous []string `json:"anonymous,omitempty"`
	// Platform is the image's, as in "linux/amd64".
	Platform string `json:"platform"`
	// Driver is the storage driver that mounts its layers.
	Driver string `json:"driver"`
	// Options is what conex has beside HostConfig.
	Options Options `json:"options,omitzero"`
	// Networks are those that it has a place of its own on, in the order of their interfaces; see Attachments. An empty list that is there means
	// that it was disconnected from all, the one that its mode names as well.
	Networks []Attachment `json:"networks,omitzero"`
}

// Attachment is a container's place on a network, as it was asked for.
type Attachment struct {
	// Network is the name that was given. NetworkID is what it meant; another network of that name takes its place when that one is gone.
	Network   string `json:"network"`
	NetworkID string `json:"networkID,omitempty"`
	// Aliases are further names of the container there, Links other containers by a name of this one's own, as "NAME:ALIAS".
	Aliases []string `json:"aliases,omitempty"`
	Links   []string `json:"links,omitempty"`
	// IPv4, IPv6 and MAC are addresses that it must have.
	IPv4 netip.Addr `json:"ipv4,omitzero"`
	IPv6 netip.Addr `json:"ipv6,omitzero"`
	MAC  string     `json:"mac,omitempty"`
	// LinkLocal are further addresses.
	LinkLocal  []netip.Addr      `json:"linkLocal,omitempty"`
	DriverOpts map[string]string `json:"driverOpts,omitempty"`
	// GwPriority says which network has the way out: the one with the highest, the first by name of equals.
	GwPriority int `json:"gwPriority,omitempty"`
}

// Same reports whether two attachments are to the same network, as far as they say it.
func (a *Attachment) Same(b *Attachment) bool {
	if a.NetworkID != "" && b.NetworkID != "" {
		return a.NetworkID == b.NetworkID
	}
	return a.Network == b.Network
}

// Attachments are the container's places on networks. A record without a list is in the network that its mode names, if the mode is one.
func (r *Record) Attachments() []Attachment {
	mode := r.HostConfig.NetworkMode
	if r.Networks != nil || mode.IsHost() || mode.IsNone() || mode.IsContainer() {
		return r.Networks
	}
	name := string(mode)
	if mode.IsDefault() || name == "" {
		name = "bridge"
	}
	return []Attachment{{Network: name}}
}

// Desired says whether a container should run, for the case that its monitor or the machine goes down.
type Desired struct {
	// Running is set by start and cleared by an end that no restart policy answers.
	Running bool `json:"running"`
	// Stopped says that a user stopped or killed it: no restart policy brings it back before the next start, and
	// unless-stopped not even a reboot.
	Stopped bool `json:"stopped"`
	// Since is when it was started, with Running; restarts by policy leave it. Zero once a monitor was told to end because the machine
	// goes down. An exit.json from before, and no state.json, mean that the run's end was lost (see Snapshot).
	Since time.Time `json:"since,omitzero"`
}

// same says that writing d in the place of old would say nothing new.
func (d Desired) same(old Desired) bool {
	return d.Running == old.Running && d.Stopped == old.Stopped && d.Since.IsZero() == old.Since.IsZero()
}

// Exit says how a container's last run ended.
type Exit struct {
	// Code is Docker's exit code: the process's own, 128+n for a signal, 125 to 127 when it could not be started.
	Code int `json:"code"`
	// Signal is the number of the signal that killed it, 0 if none.
	Signal int `json:"signal,omitempty"`
	// OOM says that the kernel killed a process in it for lack of memory.
	OOM bool `json:"oom,omitempty"`
	// MemoryLimit and PeakMemory are, with OOM, what the container was allowed to have and what it had at most, in bytes.
	MemoryLimit uint64 `json:"memoryLimit,omitempty"`
	PeakMemory  uint64 `json:"peakMemory,omitempty"`
	// Error says why it could not be started, or that its monitor died.
	Error string `json:"error,omitempty"`
	// Unstarted says that this is a start that failed, and Started a run's before it.
	Unstarted bool `json:"unstarted,omitempty"`
	// Started is zero when the process never ran.
	Started  time.Time `json:"started,omitzero"`
	Finished time.Time `json:"finished"`
	// Restarts counts how often the restart policy started it again.
	Restarts int `json:"restarts,omitempty"`
	// By is who ended it, nil when it ended by itself or nobody said so.
	By *Ender `json:"by,omitempty"`
	// Health is what the health check said until then, nil without one. It is in exit.json alone, not on the wire.
	Health *apic.Health `json:"health,omitempty"`
	// Next is when the restart policy starts it again, while it waits for that.
	Next time.Time `json:"next,omitzero"`
	// Ports are not kept: they end with the run.
}

// Ender is who ended a run, as far as conex was asked to.
type Ender struct {
	// Command is stop, kill, restart, rm, or one of the By constants.
	Command string `json:"command"`
	// Signal is what was sent first; Forced says that SIGKILL followed, after Timeout seconds.
	Signal  int  `json:"signal,omitempty"`
	Forced  bool `json:"forced,omitempty"`
	Timeout int  `json:"timeout,omitempty"`
	// UID, Pid and Process are the user's who asked: the process that connected, and the one that had started it.
	UID     int       `json:"uid,omitempty"`
	Pid     int       `json:"pid,omitempty"`
	Process string    `json:"process,omitempty"`
	Parent  string    `json:"parent,omitempty"`
	Time    time.Time `json:"time"`
}

// What ends a run without a user's command.
const (
	ByHealth   = "health check"
	ByShutdown = "shutdown"
	// ByAttached is a signal, as Ctrl-C's, that an attached command passed on.
	ByAttached = "attached"
)

// Status words of State, Docker's.
const (
	Running    = "running"
	Restarting = "restarting"
	// Starting is a monitor at work that has not executed the command yet.
	Starting = "starting"
	// Exited is a monitor that has reported the end and is still cleaning up.
	Exited = "exited"
)

// State is what a monitor says about its container while it lives.
type State struct {
	Status string `json:"status"`
	// BootID tells a state of before a reboot, should the state folder survive one.
	BootID string `json:"bootID"`
	// Monitor is the monitor's process id, for people; whether it lives is what monitor.lock says.
	Monitor int `json:"monitor"`
	// Pid is the container's first process, 0 while there is none.
	Pid     int       `json:"pid,omitempty"`
	Started time.Time `json:"started,omitzero"`
	// Exit is the end of the run before, while restarting; with Exited the one that could not be written to the disk.
	Exit     *Exit        `json:"exit,omitempty"`
	Restarts int          `json:"restarts,omitempty"`
	Health   *apic.Health `json:"health,omitempty"`
	// Endpoints are the container's places on networks, the one with its way out first.
	Endpoints []Endpoint `json:"endpoints,omitempty"`
	// Paused says that every process stands still for now: somebody commits the container.
	Paused bool `json:"paused,omitempty"`
	// ExecIDs are the running execs.
	ExecIDs []string `json:"execIDs,omitempty"`
	// Cgroup is the container's cgroup, relative to each hierarchy's root.
	Cgroup string `json:"cgroup,omitempty"`
	// AutoRemove says that the container's folder goes with its monitor (--rm); Anonymous are the volumes that go along.
	AutoRemove bool     `json:"autoRemove,omitempty"`
	Anonymous  []string `json:"anonymous,omitempty"`
}

// Endpoint is a container's place on a network, in plain words for state.json.
type Endpoint struct {
	NetworkName string `json:"networkName"`
	NetworkID   string `json:"networkID"`
	EndpointID  string `json:"endpointID"`
	// Interface is the name inside, HostInterface the one on the host, where there is one.
	Interface     string `json:"interface,omitempty"`
	HostInterface string `json:"hostInterface,omitempty"`
	Address       string `json:"address,omitempty"` // 10.0.0.2/16
	Gateway       string `json:"gateway,omitempty"`
	Address6      string `json:"address6,omitempty"`
	Gateway6      string `json:"gateway6,omitempty"`
	MAC           string `json:"mac"`
	// DefaultRoute and DefaultRoute6 say that the way out is here, by IPv4 and by IPv6.
	DefaultRoute  bool     `json:"defaultRoute,omitempty"`
	DefaultRoute6 bool     `json:"defaultRoute6,omitempty"`
	Names         []string `json:"names,omitempty"`
	// Ports are the published ones.
	Ports []portmap.Mapping `json:"ports,omitempty"`
}

// On returns the endpoint on a network, by its name or id; nil without one.
func (s *State) On(network string) *Endpoint {
	for i := range s.Endpoints {
		if e := &s.Endpoints[i]; e.NetworkName == network || e.NetworkID == network {
			return e
		}
	}
	return nil
}

// Ports are the published ports of all endpoints.
func (s *State) Ports() []portmap.Mapping {
	var out []portmap.Mapping
	for _, e := range s.Endpoints {
		out = append(out, e.Ports...)
	}
	return out
}

// Dir returns the container's folder, or a path in it.
func (s *Store) Dir(id string, elem ...string) string {
	return s.root.Path(append([]string{"containers", id}, elem...)...)
}

// Load reads a record. ErrNotFound when there is no such container, or only what a power loss left of one that was not to survive
// it (see Hollow).
func (s *Store) Load(id string) (*Record, error) {
	var r Record
	if err := disk.ReadJSON(s.Dir(id, "config.json"), &r); err != nil {
		if errors.Is(err, fs.ErrNotExist) || s.Hollow(id) {
			return nil, &NotFoundError{id}
		}
		return nil, err
	}
	return &r, nil
}

// Hollow reports whether a container's folder has no record in it: those of --rm are not synced, so a power loss may leave the
// folder with an empty file, or one of zeros. Such a folder may be removed.
func (s *Store) Hollow(id string) bool {
	path := s.Dir(id, "config.json")
	if _, err := os.Lstat(path); err != nil {
		_, derr := os.Lstat(s.Dir(id))
		return errors.Is(err, fs.ErrNotExist) && derr == nil
	}
	return blank(path)
}

// durability is less for what nobody asks for after a reboot, such as a container that goes at its end: no sync on its way.
func durability(volatile bool) disk.Durability {
	if volatile {
		return disk.Volatile
	}
	return disk.Durable
}

// Desired reads desired.json; the zero value when there is none.
func (s *Store) Desired(id string) (Desired, error) {
	var d Desired
	err := readOptional(s.Dir(id, "desired.json"), &d)
	return d, err
}

// SetDesired replaces desired.json. The caller holds the monitor lock, or asks the monitor to do it. Nothing is written when
// the file says so already. It survives a power loss if there is a restart policy, which alone asks for it after a reboot.
func (s *Store) SetDesired(r *Record, d Desired) error {
	if old, err := s.Desired(r.ID); err == nil && d.same(old) {
		return nil
	}
	return disk.WriteJSON(s.Dir(r.ID, "desired.json"), d, durability(r.HostConfig.RestartPolicy.IsNone()))
}

// Exit reads exit.json; nil when the container has not ended yet.
func (s *Store) Exit(id string) (*Exit, error) {
	var e *Exit
	err := readOptional(s.Dir(id, "exit.json"), &e)
	return e, err
}

// SetExit replaces exit.json. The caller holds the monitor lock.
func (s *Store) SetExit(r *Record, e Exit) error {
	return disk.WriteJSON(s.Dir(r.ID, "exit.json"), e, durability(r.HostConfig.AutoRemove))
}

// State reads state.json; nil when no monitor is or was at work.
func (s *Store) State(id string) (*State, error) {
	var st *State
	err := readOptional(s.RunDir(id, "state.json"), &st)
	return st, err
}

// SetState replaces state.json, in the run folder, which must exist. The caller holds the monitor lock.
func (s *Store) SetState(id string, st *State) error {
	return disk.WriteJSON(s.RunDir(id, "state.json"), st, disk.Volatile)
}

// ClearState removes state.json: nothing is left to clean up.
func (s *Store) ClearState(id string) error {
	if err := os.Remove(s.RunDir(id, "state.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func readOptional(path string, v any) error {
	err := disk.ReadJSON(path, v)
	if errors.Is(err, fs.ErrNotExist) || err != nil && blank(path) {
		return nil
	}
	return err
}

// blank reports whether a file is what a power loss may leave of one that was not synced.
func blank(path string) bool {
	b, err := os.ReadFile(path)
	return err == nil && len(bytes.Trim(b, "\x00")) == 0
}

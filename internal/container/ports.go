package container

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"conex/internal/disk"

	mnet "github.com/moby/moby/api/types/network"
)

// PortChange adds published ports to a container, or takes some away.
type PortChange struct {
	// Add are bindings as HostConfig.PortBindings has them.
	Add mnet.PortMap `json:"add,omitempty"`
	// Remove are published ports.
	Remove []PortName `json:"remove,omitempty"`
}

// PortName names a published port by what is known of it; what is zero matches all.
type PortName struct {
	mnet.PortBinding
	// Private is the port inside, Proto its protocol.
	Private uint16          `json:"private,omitempty"`
	Proto   mnet.IPProtocol `json:"proto"`
}

// String returns it as the command line has it.
func (n PortName) String() string {
	s := hostSide(n.PortBinding)
	if n.Private != 0 {
		s += ":" + strconv.Itoa(int(n.Private))
	}
	return s + "/" + string(n.Proto)
}

func hostSide(b mnet.PortBinding) string {
	switch {
	case !b.HostIP.IsValid():
		return b.HostPort
	case b.HostIP.Is6():
		return "[" + b.HostIP.String() + "]:" + b.HostPort
	}
	return b.HostIP.String() + ":" + b.HostPort
}

// matches reports whether a binding of a port is one that is named. A binding that left the host's port open is, too: it became some port.
func (n PortName) matches(p mnet.Port, b mnet.PortBinding) bool {
	if n.Proto != p.Proto() || n.Private != 0 && n.Private != p.Num() || n.HostIP.IsValid() && n.HostIP != b.HostIP {
		return false
	}
	return n.HostPort == "" || n.HostPort == b.HostPort
}

// loose is matches for bindings that name no one port.
func (n PortName) loose(p mnet.Port, b mnet.PortBinding) bool {
	first, last, ranged := strings.Cut(b.HostPort, "-")
	if ranged {
		x, xerr := strconv.Atoi(first)
		y, yerr := strconv.Atoi(last)
		h, herr := strconv.Atoi(n.HostPort)
		if xerr != nil || yerr != nil || herr != nil || h < x || h > y {
			return false
		}
	} else if b.HostPort != "" && b.HostPort != "0" {
		return false
	}
	b.HostPort = n.HostPort
	return n.matches(p, b)
}

// UpdatePorts changes which ports a container publishes at its next starts. The caller holds the monitor lock, or is the monitor.
// ErrConflict when it publishes such a port already, or does not publish one that is to go. -P becomes a list of the
// ports that it meant as soon as one of them goes.
func (s *Store) UpdatePorts(id string, c *PortChange) (*Record, error) {
	l, err := s.lockNames() // a rename changes the record too
	if err != nil {
		return nil, err
	}
	defer l.Release()
	r, err := s.Load(id)
	if err != nil {
		return nil, err
	}
	if err := r.ChangePorts(c); err != nil {
		return nil, err
	}
	return r, disk.WriteJSON(s.Dir(id, "config.json"), r, durability(r.HostConfig.AutoRemove))
}

// ChangePorts is UpdatePorts without the disk.
func (r *Record) ChangePorts(c *PortChange) error {
	hc := *r.HostConfig
	ports := mnet.PortMap{}
	for p, bs := range hc.PortBindings {
		if len(bs) == 0 {
			bs = []mnet.PortBinding{{}}
		}
		ports[p] = slices.Clone(bs)
	}
	if len(c.Remove) > 0 && hc.PublishAllPorts {
		hc.PublishAllPorts = false
		for p := range r.Config.ExposedPorts {
			if _, ok := ports[p]; !ok {
				ports[p] = []mnet.PortBinding{{}}
			}
		}
	}
	for _, n := range c.Remove {
		if !n.take(ports) {
			return conflictError(fmt.Sprintf("no public port '%s' published for %s", n, r.Name))
		}
	}
	for p, bs := range c.Add {
		for _, b := range bs {
			if b.HostPort != "" && slices.Contains(ports[p], b) {
				return conflictError(fmt.Sprintf("port %s is published at %s already", p, hostSide(b)))
			}
			ports[p] = append(ports[p], b)
		}
	}
	hc.PortBindings = ports
	r.HostConfig = &hc
	return nil
}

// take removes the binding that is named: one that is so exactly, else one that could have become it.
func (n PortName) take(ports mnet.PortMap) bool {
	keys := slices.SortedFunc(maps.Keys(ports), func(a, b mnet.Port) int { return strings.Compare(a.String(), b.String()) })
	for _, match := range []func(mnet.Port, mnet.PortBinding) bool{n.matches, n.loose} {
		for _, p := range keys {
			k := slices.IndexFunc(ports[p], func(b mnet.PortBinding) bool { return match(p, b) })
			if k < 0 {
				continue
			}
			if ports[p] = slices.Delete(ports[p], k, k+1); len(ports[p]) == 0 {
				delete(ports, p)
			}
			return true
		}
	}
	return false
}

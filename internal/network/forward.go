package network

import (
	"bytes"
	"conex/internal/linux/netlink"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"

	rtnetlink "github.com/vishvananda/netlink"

	"conex/internal/disk"
	"conex/internal/portmap"
)

// guard is what conex changed when it made the host a router, kept in <state>/net/guard.json.
type guard struct {
	// Interfaces: see portmap.Table.Guard.
	Interfaces []string `json:"interfaces"`
	// IPv4 and IPv6 say for which family conex switched forwarding on.
	IPv4 bool `json:"ipv4,omitempty"`
	IPv6 bool `json:"ipv6,omitempty"`
	// AcceptRA are the interfaces that were made to go on heeding router advertisements, which a router does not.
	AcceptRA []string `json:"acceptRA,omitempty"`
}

const (
	forwardFile4 = "/proc/sys/net/ipv4/ip_forward"
	forwardFile6 = "/proc/sys/net/ipv6/conf/all/forwarding"
)

func (m *Manager) guardPath() string { return filepath.Join(m.state, "guard.json") }

func (m *Manager) readGuard() (guard, error) {
	var g guard
	err := disk.ReadJSON(m.guardPath(), &g)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return g, fmt.Errorf("read guard: %w", err)
	}
	return g, nil
}

// forward sees to it that the host forwards packets for a network. It makes the host a router between all its interfaces, so what did
// not pass before must not pass now: the table's guard stands first.
func (m *Manager) forward(ctx context.Context, t portmap.Table, i Info) error {
	on4, err := switchedOn(forwardFile4)
	if err != nil {
		return err
	}
	on6 := true
	if i.IPv6.Valid() {
		if on6, err = switchedOn(forwardFile6); err != nil {
			return err
		}
	}
	if on4 && on6 {
		return nil
	}
	l, err := m.lockTable(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	g, err := m.readGuard()
	if err != nil {
		return err
	}
	out, err := uplinks()
	if err != nil {
		return err
	}
	for _, name := range out {
		if !slices.Contains(g.Interfaces, name) {
			g.Interfaces = append(g.Interfaces, name)
		}
		if !on6 && !slices.Contains(g.AcceptRA, name) && readSysctl("ipv6/conf/"+name+"/accept_ra") == "1" {
			g.AcceptRA = append(g.AcceptRA, name)
		}
	}
	g.IPv4, g.IPv6 = g.IPv4 || !on4, g.IPv6 || !on6
	if err := disk.WriteJSON(m.guardPath(), g, disk.Volatile); err != nil {
		return err
	}
	t.Guard = g.Interfaces
	if err := portmap.Rebuild(t); err != nil {
		return err
	}
	if !on6 {
		for _, name := range g.AcceptRA {
			if err := writeSysctl("ipv6/conf/"+name+"/accept_ra", "2"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := os.WriteFile(forwardFile6, []byte("1"), 0); err != nil {
			return fmt.Errorf("switch IPv6 forwarding on: %w", err)
		}
	}
	if !on4 {
		if err := os.WriteFile(forwardFile4, []byte("1"), 0); err != nil {
			return fmt.Errorf("switch forwarding on: %w", err)
		}
	}
	return nil
}

// unforward switches forwarding off where conex switched it on, since the guard goes with the table. An interface that came after
// (another engine's bridge) may need it by now: then it stays.
func (m *Manager) unforward() error {
	g, err := m.readGuard()
	if err != nil || !g.IPv4 && !g.IPv6 {
		return err
	}
	links, err := netlink.Dump(rtnetlink.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		// Better a router too many than Docker's containers cut off.
		if l.Type() == "bridge" && !slices.Contains(g.Interfaces, l.Attrs().Name) {
			return nil
		}
	}
	if g.IPv4 {
		if err := os.WriteFile(forwardFile4, []byte("0"), 0); err != nil {
			return fmt.Errorf("switch forwarding off: %w", err)
		}
	}
	if g.IPv6 {
		if err := os.WriteFile(forwardFile6, []byte("0"), 0); err != nil {
			return fmt.Errorf("switch IPv6 forwarding off: %w", err)
		}
		for _, name := range g.AcceptRA {
			if err := writeSysctl("ipv6/conf/"+name+"/accept_ra", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// uplinks are the interfaces that lead out of the host: all but lo, the bridges of container engines and virtual machines
// (whose owners want them forwarded), and what is a port of another.
func uplinks() ([]string, error) {
	links, err := netlink.Dump(rtnetlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	outward := make(map[int]bool) // bridges with a port that is no container's or machine's
	for _, l := range links {
		if t := l.Type(); l.Attrs().MasterIndex != 0 && t != "veth" && t != "tuntap" && t != "tun" {
			outward[l.Attrs().MasterIndex] = true
		}
	}
	names := []string{}
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 || a.MasterIndex != 0 || l.Type() == "bridge" && !outward[a.Index] {
			continue
		}
		names = append(names, a.Name)
	}
	return names, nil
}

func switchedOn(file string) (bool, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return false, fmt.Errorf("read forwarding: %w", err)
	}
	return string(bytes.TrimSpace(b)) != "0", nil
}

// readSysctl reads a setting below /proc/sys/net; empty when there is none.
func readSysctl(path string) string {
	b, err := os.ReadFile("/proc/sys/net/" + path)
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

// writeSysctl changes a setting below /proc/sys/net unless it has the value.
func writeSysctl(path, value string) error {
	if readSysctl(path) == value {
		return nil
	}
	return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0)
}

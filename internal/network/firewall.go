package network

import (
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

// policyDocker is the content of <state>/net/publish-policy under config.PublishDocker. Without the file the host's firewall is obeyed.
const policyDocker = "docker"

func (m *Manager) policyPath() string { return filepath.Join(m.state, "publish-policy") }

// SetPolicy says whether published ports are translated before the host's input chains see their packets, as Docker does it, or obey
// them. The table follows at its next use; what runs keeps the listeners that it has.
func (m *Manager) SetPolicy(ctx context.Context, docker bool) error {
	was, err := m.dockerPolicy()
	if err != nil || was == docker {
		return err
	}
	if err := os.MkdirAll(m.state, 0o711); err != nil {
		return fmt.Errorf("make network state: %w", err)
	}
	l, err := m.lockTable(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	if docker {
		return disk.WriteFile(m.policyPath(), []byte(policyDocker+"\n"), 0o644, disk.Volatile)
	}
	if err := os.Remove(m.policyPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set publish policy: %w", err)
	}
	return nil
}

func (m *Manager) dockerPolicy() (bool, error) {
	_, err := os.Lstat(m.policyPath())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// speak sees that this root's bridges pass where iptables' FORWARD chain drops by default, and reports for which it had to. What that
// policy kept apart from containers, other engines' bridges and virtual machines, stays apart.
func (m *Manager) speak(ctx context.Context) ([]string, error) {
	drops, err := portmap.Drops(portmap.Table{Socket: m.socket})
	if err != nil {
		return nil, err
	}
	legacy, err := portmap.LegacyForward(nil)
	if err != nil || !drops && len(legacy) == 0 {
		return nil, err
	}
	t, err := m.table(ctx)
	if err != nil {
		return nil, err
	}
	list, err := m.records()
	if err != nil {
		return nil, err
	}
	links, err := netlink.Dump(rtnetlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	out, err := uplinks()
	if err != nil {
		return nil, err
	}
	var ours, foreign []string
	for _, l := range links {
		name := l.Attrs().Name
		switch {
		case slices.ContainsFunc(list, func(i Info) bool { return i.Interface == name && i.Driver == DriverBridge }):
			ours = append(ours, name)
		case l.Type() == "bridge" && !slices.Contains(out, name):
			foreign = append(foreign, name)
		}
	}
	l, err := m.lockTable(ctx)
	if err != nil {
		return nil, err
	}
	defer l.Release()
	if err := portmap.KeepFrom(t, foreign); err != nil {
		return nil, err
	}
	done, err := portmap.Pass(ours)
	if err != nil || len(legacy) == 0 {
		return done, err
	}
	more, err := speakLegacy(ctx, ours)
	for _, b := range more {
		if !slices.Contains(done, b) {
			done = append(done, b)
		}
	}
	return done, err
}

// upUplinks are the uplinks that something can come through.
func (m *Manager) upUplinks() ([]string, error) {
	out, err := uplinks()
	return slices.DeleteFunc(out, func(name string) bool {
		l, err := net.InterfaceByName(name)
		return err != nil || l.Flags&net.FlagUp == 0
	}), err
}

// Reaches says from where the ports that endpoints publish can be reached, and why. It changes nothing.
func (m *Manager) Reaches(ctx context.Context, name string, ports []portmap.Mapping) ([]portmap.Reach, error) {
	t, err := m.table(ctx)
	if err != nil {
		return nil, err
	}
	out, err := m.upUplinks()
	if err != nil {
		return nil, err
	}
	list, err := m.records()
	if err != nil {
		return nil, err
	}
	bridges := map[string]string{}
	for _, i := range list {
		if _, err := rtnetlink.LinkByName(i.Interface); err == nil && i.Driver == DriverBridge {
			bridges[i.Name] = i.Interface
		}
	}
	return portmap.Reaches(ctx, t, name, ports, portmap.Surroundings{Uplinks: out, Networks: bridges})
}

package network

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
)

// allocate claims an address of the network for a container: the preferred one if it is free, else the lowest. The caller
// holds the network's lock.
func (m *Manager) allocate(i Info, container string, preferred netip.Addr) (netip.Addr, error) {
	ip, err := m.pick(i, container, preferred)
	if !errors.Is(err, ErrNoAddress) {
		return ip, err
	}
	// A crash between claim and record, or between the removal of a record and of its claim, leaves a claim that nobody has.
	if rerr := m.reap(i); rerr != nil {
		return netip.Addr{}, errors.Join(err, rerr)
	}
	return m.pick(i, container, preferred)
}

func (m *Manager) pick(i Info, container string, preferred netip.Addr) (netip.Addr, error) {
	if preferred.IsValid() && i.Subnet.Contains(preferred) {
		if ok, err := m.claim(i, container, preferred); ok || err != nil {
			return preferred, err
		}
	}
	entries, err := os.ReadDir(m.dir(i.ID, "addr"))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list addresses: %w", err)
	}
	taken := make(map[string]bool, len(entries))
	for _, e := range entries {
		taken[e.Name()] = true
	}
	last := lastAddr(i.Subnet)
	for ip := i.Subnet.Masked().Addr().Next(); ip.Less(last); ip = ip.Next() {
		if ip == i.Gateway || taken[ip.String()] {
			continue
		}
		if ok, err := m.claim(i, container, ip); ok || err != nil {
			return ip, err
		}
	}
	return netip.Addr{}, fmt.Errorf("network %s: %w in %s, %d in use", i.Name, ErrNoAddress, i.Subnet, len(entries))
}

// claim takes one address; false when somebody has it.
func (m *Manager) claim(i Info, container string, ip netip.Addr) (bool, error) {
	err := os.Symlink(container, m.dir(i.ID, "addr", ip.String()))
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("claim address %s: %w", ip, err)
	}
	return true, nil
}

// release gives a container's address back. Idempotent; an address that another container has by now stays.
func (m *Manager) release(i Info, container string, ip netip.Addr) error {
	path := m.dir(i.ID, "addr", ip.String())
	if owner, err := os.Readlink(path); err != nil || owner != container {
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("release address %s: %w", ip, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release address %s: %w", ip, err)
	}
	return nil
}

// reap removes claims without an endpoint record. Under the network's lock no claim is between the two.
func (m *Manager) reap(i Info) error {
	entries, err := os.ReadDir(m.dir(i.ID, "addr"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, e := range entries {
		path := m.dir(i.ID, "addr", e.Name())
		owner, err := os.Readlink(path)
		if err != nil {
			return fmt.Errorf("read claim: %w", err)
		}
		ep, err := m.readEndpoint(i.ID, owner)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err == nil && ep.Address.Addr().String() == e.Name() {
			continue
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("reap claim: %w", err)
		}
	}
	return nil
}

// lastAddr is the broadcast address of a subnet.
func lastAddr(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	for b := p.Bits(); b < 32; b++ {
		a[b/8] |= 0x80 >> (b % 8)
	}
	return netip.AddrFrom4(a)
}

// hardwareAddr derives a locally administered MAC from the network and an address on it. So it differs from host to host (the
// network's id is random), and whoever gets a used address gets its MAC too: no neighbour table on host or containers is ever wrong.
func hardwareAddr(networkID string, ip netip.Addr) net.HardwareAddr {
	h := sha256.Sum256([]byte(networkID + " " + ip.String()))
	mac := net.HardwareAddr(h[:6])
	mac[0] = mac[0]&^0x01 | 0x02 // unicast, locally administered
	return mac
}

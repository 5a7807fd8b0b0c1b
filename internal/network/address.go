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

// allocate claims an address of the network's pool for a container: the preferred one if it is free, else the lowest. The caller
// holds the network's lock.
func (m *Manager) allocate(i Info, p Pool, container string, preferred netip.Addr) (netip.Addr, error) {
	ip, err := m.pick(i, p, container, preferred)
	if !errors.Is(err, ErrNoAddress) {
		return ip, err
	}
	// A crash between claim and record, or between the removal of a record and of its claim, leaves a claim that nobody has.
	if rerr := m.reap(i); rerr != nil {
		return netip.Addr{}, errors.Join(err, rerr)
	}
	return m.pick(i, p, container, preferred)
}

func (m *Manager) pick(i Info, p Pool, container string, preferred netip.Addr) (netip.Addr, error) {
	if preferred.IsValid() && p.Subnet.Contains(preferred) {
		if ok, err := m.claim(i, container, preferred); ok || err != nil {
			return preferred, err
		}
	}
	entries, err := os.ReadDir(m.dir(i.ID, "addr"))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list addresses: %w", err)
	}
	taken := make(map[string]bool, len(entries)+len(p.Aux))
	for _, e := range entries {
		taken[e.Name()] = true
	}
	for _, a := range p.Aux {
		taken[a.String()] = true
	}
	from := p.Subnet.Masked()
	if p.Range.IsValid() {
		from = p.Range.Masked()
	}
	last := lastAddr(from)
	for ip := from.Addr(); ip.IsValid() && !last.Less(ip); ip = ip.Next() {
		if ip == p.Gateway || p.reserved(ip) || taken[ip.String()] {
			continue
		}
		if ok, err := m.claim(i, container, ip); ok || err != nil {
			return ip, err
		}
	}
	family := 4
	if from.Addr().Is6() {
		family = 6
	}
	return netip.Addr{}, fmt.Errorf("no available IPv%d addresses on this network's address pools: %w in %s, %d in use", family, ErrNoAddress, from, len(entries))
}

// want claims one address and no other. The caller holds the network's lock.
func (m *Manager) want(i Info, p Pool, container string, ip netip.Addr) error {
	switch {
	case !p.Subnet.Contains(ip):
		return fmt.Errorf("address %s is not in a subnet of network %s (%s)", ip, i.Name, i.subnets())
	case ip == p.Gateway || p.reserved(ip):
		return fmt.Errorf("address %s: %w", ip, ErrAddressTaken)
	}
	for name, a := range p.Aux {
		if a == ip {
			return fmt.Errorf("address %s: %w (%s of --aux-address)", ip, ErrAddressTaken, name)
		}
	}
	ok, err := m.claim(i, container, ip)
	if err == nil && !ok {
		if err = m.reap(i); err == nil {
			ok, err = m.claim(i, container, ip)
		}
	}
	if err == nil && !ok {
		owner, _ := os.Readlink(m.dir(i.ID, "addr", ip.String())) // a courtesy
		if ep, rerr := m.readEndpoint(i.ID, owner); rerr == nil && ep.ContainerName != "" {
			owner = ep.ContainerName
		}
		return fmt.Errorf("address %s: %w (by container %s)", ip, ErrAddressTaken, owner)
	}
	return err
}

// reserved reports whether an address means all hosts of the subnet.
func (p Pool) reserved(ip netip.Addr) bool {
	if p.Subnet.Bits() >= ip.BitLen()-1 {
		return false // RFC 3021: no such addresses in a subnet of two
	}
	return ip == p.Subnet.Masked().Addr() || ip.Is4() && ip == lastAddr(p.Subnet)
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

// release gives an endpoint's addresses back. Idempotent; an address that another container has by now stays.
func (m *Manager) release(i Info, ep *Endpoint) error {
	var errs []error
	for _, a := range []netip.Prefix{ep.Address, ep.Address6} {
		if !a.IsValid() {
			continue
		}
		path := m.dir(i.ID, "addr", a.Addr().String())
		owner, err := os.Readlink(path)
		if err == nil && owner == ep.ContainerID {
			err = os.Remove(path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("release address %s: %w", a.Addr(), err))
		}
	}
	return errors.Join(errs...)
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
		if err == nil && (ep.Address.Addr().String() == e.Name() || ep.Address6.Addr().String() == e.Name()) {
			continue
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("reap claim: %w", err)
		}
	}
	return nil
}

// lastAddr is the last address of a subnet, with IPv4 the broadcast address.
func lastAddr(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().AsSlice()
	for b := p.Bits(); b < len(a)*8; b++ {
		a[b/8] |= 0x80 >> (b % 8)
	}
	last, _ := netip.AddrFromSlice(a)
	return last
}

// hardwareAddr derives a locally administered MAC from the network and an address on it. So it differs from host to host (the
// network's id is random), and whoever gets a used address gets its MAC too: no neighbour table on host or containers is ever wrong.
func hardwareAddr(networkID string, ip netip.Addr) net.HardwareAddr {
	h := sha256.Sum256([]byte(networkID + " " + ip.String()))
	mac := net.HardwareAddr(h[:6])
	mac[0] = mac[0]&^0x01 | 0x02 // unicast, locally administered
	return mac
}

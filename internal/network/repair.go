package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	rtnetlink "github.com/vishvananda/netlink"

	"conex/internal/disk"
	"conex/internal/portmap"
)

// Repair sees that every network with containers on it, and every bridge that stands, is in the kernel as the records have it: bridge, addresses,
// the containers' interfaces on it, forwarding, the nftables table with its elements, and what iptables must let pass. It
// returns what it mended, in words. Idempotent.
func (m *Manager) Repair(ctx context.Context) ([]string, error) {
	list, err := m.records()
	if err != nil {
		return nil, err
	}
	var done []string
	var errs []error
	used := false
	for _, i := range list {
		if i.Driver != DriverBridge {
			continue
		}
		mended, in, err := m.repair(ctx, i)
		done = append(done, mended...)
		used = used || in
		if err != nil {
			errs = append(errs, fmt.Errorf("repair network %s: %w", i.Name, err))
		}
	}
	if !used {
		return done, errors.Join(errs...)
	}
	mended, err := m.repairPorts(ctx)
	return append(done, mended...), errors.Join(append(errs, err)...)
}

// repair is Repair for one network; used says that there was something to look after.
func (m *Manager) repair(ctx context.Context, i Info) (done []string, used bool, err error) {
	if _, err := os.Lstat(m.dir(i.ID)); errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil // nothing was made for it since the machine started
	}
	l, err := m.lock(ctx, i.ID)
	if err != nil {
		return nil, false, err
	}
	defer l.Release()
	eps, err := m.endpoints(i.ID)
	if err != nil {
		return nil, false, err
	}
	br, ok, err := m.standing(i)
	switch {
	case err != nil:
		return nil, false, err
	case !ok && len(eps) == 0 && i.Name != Bridge:
		return nil, false, nil // it is made when a container comes
	case !ok && len(eps) == 0:
		if _, err := rtnetlink.LinkByName(i.Interface); err != nil {
			return nil, false, nil
		}
	}
	if !ok {
		if i, br, err = m.raise(ctx, i); err != nil {
			return nil, true, err
		}
		done = append(done, fmt.Sprintf("bridge %s of network %s set up again", i.Interface, i.Name))
	}
	for _, ep := range eps {
		link, err := rtnetlink.LinkByName(ep.HostInterface)
		if err != nil {
			continue // it went with its container
		}
		if a := link.Attrs(); a.MasterIndex == int(br.index) && a.RawFlags&1 != 0 {
			continue
		}
		if err := rtnetlink.LinkSetMasterByIndex(link, int(br.index)); err != nil {
			return done, true, fmt.Errorf("bring %s back: %w", ep.HostInterface, err)
		}
		if err := rtnetlink.LinkSetUp(link); err != nil {
			return done, true, fmt.Errorf("bring %s back: %w", ep.HostInterface, err)
		}
		done = append(done, fmt.Sprintf("container %s is on bridge %s again", ep.ContainerName, i.Interface))
	}
	t, err := m.table(ctx)
	if err != nil {
		return done, true, err
	}
	stood, err := portmap.Standing(t, i.bridge())
	if err != nil {
		return done, true, err
	}
	on4, err := switchedOn(forwardFile4)
	if err != nil {
		return done, true, err
	}
	on6, err := switchedOn(forwardFile6)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return done, true, err
	}
	if _, _, err := m.provide(ctx, i); err != nil {
		return done, true, err
	}
	if !stood {
		done = append(done, fmt.Sprintf("nftables table %s has network %s again", t.Name, i.Name))
	}
	if !on4 {
		done = append(done, "IPv4 forwarding switched on")
	}
	if !on6 && i.IPv6.Valid() {
		done = append(done, "IPv6 forwarding switched on")
	}
	return done, true, nil
}

// repairPorts sees that the table has the elements of all bridges and published ports, and that iptables lets them pass.
func (m *Manager) repairPorts(ctx context.Context) (done []string, err error) {
	t, err := m.table(ctx)
	if err != nil {
		return nil, err
	}
	l, err := m.lockTable(ctx)
	if err != nil {
		return nil, err
	}
	missing, err := portmap.Missing(ctx, t)
	if err == nil && missing > 0 {
		if err = portmap.Rebuild(t); err == nil {
			done = append(done, fmt.Sprintf("%d elements put back into nftables table %s", missing, t.Name))
		}
	}
	l.Release()
	if err != nil {
		return nil, err
	}
	passed, err := m.speak(ctx)
	for _, b := range passed {
		done = append(done, "iptables' FORWARD chain lets "+b+" pass")
	}
	return done, err
}

// Mend is Repair for monitors, which all hear of one change: whoever comes first looks, unless somebody has looked since.
func (m *Manager) Mend(ctx context.Context, since time.Time) error {
	l, err := disk.TryAcquire(filepath.Join(m.state, "repair.lock"))
	if errors.Is(err, disk.ErrLocked) {
		return nil // whoever looks has heard of the same change
	}
	if err != nil {
		return err
	}
	defer l.Release()
	st, err := l.File().Stat()
	if err != nil {
		return err
	}
	if st.ModTime().After(since) {
		return nil
	}
	if err := os.Chtimes(l.File().Name(), time.Time{}, time.Now()); err != nil {
		return err
	}
	_, err = m.Repair(ctx)
	return err
}

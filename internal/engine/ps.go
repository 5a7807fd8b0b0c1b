package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"conex/internal/build"
	"conex/internal/container"
	"conex/internal/image"
	"conex/internal/network"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
)

// ListRequest selects containers. The zero value selects those that run.
type ListRequest struct {
	// All includes those that don't run.
	All bool
	// Latest selects the newest one, Last that many of the newest; both include those that don't run.
	Latest bool
	Last   int
	// Size asks for the sizes, which takes a walk through each writable layer.
	Size bool
	// Filters are Docker's: id, name, label, status, exited, ancestor, before, since, volume, network, publish, expose, health; and egress, whose
	// values are deny, any, allow, or an entry of the list.
	// Values of one filter are alternatives, but labels must all be there.
	Filters map[string][]string
}

// ContainerSummary is a line of `ps`: the Engine API's, with what conex says besides.
type ContainerSummary struct {
	apic.Summary
	// Egress is what it may reach (--egress), none for anything.
	Egress []string `json:",omitempty"`
}

// ListContainers lists containers, newest first. An error of settling a dead one comes beside the list, which is complete all the
// same and shows that one as it was.
func (e *Engine) ListContainers(ctx context.Context, req ListRequest) ([]ContainerSummary, error) {
	all, unsettled, err := e.settledBriefs(ctx)
	if err != nil {
		return nil, err
	}
	f, err := e.containerFilter(req.Filters, all)
	if err != nil {
		return nil, err
	}
	last := req.Last
	if req.Latest {
		last = 1
	}
	stopped := req.All || last > 0 || len(req.Filters["status"]) > 0 || len(req.Filters["exited"]) > 0
	names := map[string]string{}
	now := time.Now()
	out := []ContainerSummary{}
	for _, n := range all {
		if last > 0 && len(out) == last {
			break
		}
		if !stopped && n.Alive() == nil {
			continue
		}
		if ok, err := f(n); err != nil || !ok {
			if err != nil {
				return nil, err
			}
			continue
		}
		s, err := e.summary(n, now, names)
		if err != nil {
			return nil, err
		}
		if req.Size {
			if s.SizeRw, s.SizeRootFs, err = e.sizes(n.Record); err != nil {
				return nil, err
			}
		}
		out = append(out, ContainerSummary{s, n.Record.Options.Egress})
	}
	return out, unsettled
}

// settledBriefs is Settle and snapshots in one, with what a list needs alone: for a container that runs, two reads and one try of a lock.
// The first error is Settle's.
func (e *Engine) settledBriefs(ctx context.Context) (all []*container.Snapshot, unsettled, err error) {
	cs := e.Containers()
	ids, err := cs.List()
	if err != nil {
		return nil, nil, err
	}
	ran, err := cs.ListRun()
	if err != nil {
		return nil, nil, err
	}
	slices.Sort(ids)
	for _, id := range ran { // what a killed rm left
		if _, ok := slices.BinarySearch(ids, id); !ok {
			unsettled = errors.Join(unsettled, e.settleOne(ctx, id))
		}
	}
	read, errs, late := make([]*container.Snapshot, len(ids)), make([]error, len(ids)), make([]error, len(ids))
	each(len(ids), func(i int) {
		if errs[i] = ctx.Err(); errs[i] != nil {
			return
		}
		st, err := cs.State(ids[i])
		if err != nil {
			errs[i] = err
			return
		}
		if st != nil && (&container.Snapshot{State: st}).Alive() != nil && cs.Watched(ids[i]) {
			read[i], errs[i] = cs.Brief(ids[i], st)
			return
		}
		late[i] = e.settleOne(ctx, ids[i])
		read[i], errs[i] = cs.Brief(ids[i], nil)
	})
	unsettled = errors.Join(unsettled, errors.Join(late...), build.Settle(ctx, e.cfg.State, e.Networks()))
	all, err = newestFirst(read, errs)
	return all, unsettled, err
}

// snapshots reads all containers, newest first.
func (e *Engine) snapshots(ctx context.Context) ([]*container.Snapshot, error) {
	cs := e.Containers()
	ids, err := cs.List()
	if err != nil {
		return nil, err
	}
	read, errs := make([]*container.Snapshot, len(ids)), make([]error, len(ids))
	each(len(ids), func(i int) {
		if errs[i] = ctx.Err(); errs[i] == nil {
			read[i], errs[i] = cs.Snapshot(ids[i])
		}
	})
	return newestFirst(read, errs)
}

// newestFirst sorts what was read of containers, without those that were removed meanwhile; any other error is returned.
func newestFirst(read []*container.Snapshot, errs []error) ([]*container.Snapshot, error) {
	out := make([]*container.Snapshot, 0, len(read))
	for i, n := range read {
		if errors.Is(errs[i], container.ErrNotFound) {
			continue
		}
		if errs[i] != nil {
			return nil, errs[i]
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b *container.Snapshot) int {
		return cmp.Or(b.Record.Created.Compare(a.Record.Created), cmp.Compare(a.Record.ID, b.Record.ID))
	})
	return out, nil
}

// summary makes the line of `ps`. names remembers which images still go by the name that the container was made by.
func (e *Engine) summary(n *container.Snapshot, now time.Time, names map[string]string) (apic.Summary, error) {
	r := n.Record
	s := apic.Summary{
		ID: r.ID, Names: []string{"/" + r.Name}, Image: r.Image, ImageID: string(r.ImageID), Command: commandText(r),
		Created: r.Created.Unix(), Labels: r.Config.Labels, State: n.Status(), Status: n.StatusText(now), Mounts: shownMounts(r),
		Ports: portSummaries(n), NetworkSettings: &apic.NetworkSettingsSummary{Networks: networks(n)},
	}
	if s.Labels == nil {
		s.Labels = map[string]string{}
	}
	s.HostConfig.NetworkMode = string(r.HostConfig.NetworkMode)
	if a := n.Alive(); a != nil && a.Health != nil {
		s.Health = &apic.HealthSummary{Status: a.Health.Status, FailingStreak: a.Health.FailingStreak}
	} else {
		s.Health = &apic.HealthSummary{Status: apic.NoHealthcheck}
	}
	// An image that has lost its name to another shows by its id, as in Docker.
	id, ok := names[r.Image]
	if !ok {
		images, err := e.Images()
		if err != nil {
			return s, err
		}
		img, err := images.Resolve(r.Image)
		if err != nil && !errors.Is(err, image.ErrNotFound) {
			return s, err
		}
		id = string(img.ID)
		names[r.Image] = id
	}
	if id != s.ImageID {
		s.Image = s.ImageID
	}
	return s, nil
}

// commandText is the command as `ps` shows it.
func commandText(r *container.Record) string {
	parts := make([]string, 0, len(r.Args)+1)
	for _, a := range append([]string{r.Path}, r.Args...) {
		if strings.Contains(a, " ") {
			a = "'" + a + "'"
		}
		parts = append(parts, a)
	}
	return strings.Join(parts, " ")
}

// portSummaries lists what is published and, of a running container, what is only exposed.
func portSummaries(n *container.Snapshot) []apic.PortSummary {
	out := []apic.PortSummary{}
	a := n.Alive()
	if a == nil {
		return out
	}
	published := map[mnet.Port]bool{}
	for _, m := range a.Ports() {
		if p, ok := mnet.PortFrom(m.ContainerPort, mnet.IPProtocol(m.Proto)); ok {
			published[p] = true
		}
		for _, ip := range hostAddresses(m.HostIP) {
			out = append(out, apic.PortSummary{IP: ip, PrivatePort: m.ContainerPort, PublicPort: m.HostPort, Type: m.Proto})
		}
	}
	if len(a.Endpoints) > 0 {
		for p := range n.Record.Config.ExposedPorts {
			if !published[p] {
				out = append(out, apic.PortSummary{PrivatePort: p.Num(), Type: string(p.Proto())})
			}
		}
	}
	slices.SortFunc(out, func(a, b apic.PortSummary) int {
		return cmp.Or(cmp.Compare(a.PrivatePort, b.PrivatePort), cmp.Compare(a.Type, b.Type), a.IP.Compare(b.IP), cmp.Compare(a.PublicPort, b.PublicPort))
	})
	return out
}

// hostAddresses spells "all addresses" out, as Docker does.
func hostAddresses(ip netip.Addr) []netip.Addr {
	if ip.IsValid() {
		return []netip.Addr{ip}
	}
	return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
}

// networks describes the container's endpoints; an endpoint of a container that doesn't run has what was asked for alone.
func networks(n *container.Snapshot) map[string]*mnet.EndpointSettings {
	out := map[string]*mnet.EndpointSettings{}
	mode := n.Record.HostConfig.NetworkMode
	if mode.IsHost() || mode.IsNone() && n.Record.Networks == nil {
		out[string(mode)] = &mnet.EndpointSettings{}
	}
	a := n.Alive()
	for _, at := range n.Record.Attachments() {
		ep := &mnet.EndpointSettings{Links: at.Links, Aliases: at.Aliases, DriverOpts: at.DriverOpts, GwPriority: at.GwPriority, NetworkID: at.NetworkID}
		if at.IPv4.IsValid() || at.IPv6.IsValid() || len(at.LinkLocal) > 0 {
			ep.IPAMConfig = &mnet.EndpointIPAMConfig{IPv4Address: at.IPv4, IPv6Address: at.IPv6, LinkLocalIPs: at.LinkLocal}
		}
		_ = ep.MacAddress.UnmarshalText([]byte(at.MAC)) // it was checked when it was given
		out[at.Network] = ep
		if a == nil {
			if n.Exit == nil {
				ep.NetworkID = "" // it has not been on it yet
			}
			continue
		}
		if e := a.On(at.NetworkID); e != nil && at.NetworkID != "" {
			fillEndpoint(ep, e, n.Record)
		} else if e := a.On(at.Network); e != nil {
			fillEndpoint(ep, e, n.Record)
		}
	}
	return out
}

// fillEndpoint puts what a running container's endpoint has into its description.
func fillEndpoint(ep *mnet.EndpointSettings, e *container.Endpoint, r *container.Record) {
	ep.NetworkID, ep.EndpointID = e.NetworkID, e.EndpointID
	if e.NetworkName != network.Bridge { // where nobody has a name
		ep.DNSNames = slices.Clone(e.Names)
		if len(ep.DNSNames) > 0 {
			ep.DNSNames[0] = r.Name // which may have changed since
		}
	}
	if p, err := netip.ParsePrefix(e.Address); err == nil {
		ep.IPAddress, ep.IPPrefixLen = p.Addr(), p.Bits()
	}
	if p, err := netip.ParsePrefix(e.Address6); err == nil {
		ep.GlobalIPv6Address, ep.GlobalIPv6PrefixLen = p.Addr(), p.Bits()
	}
	// What is missing stays empty, and nothing wrong can be in the record.
	ep.Gateway, _ = netip.ParseAddr(e.Gateway)
	ep.IPv6Gateway, _ = netip.ParseAddr(e.Gateway6)
	_ = ep.MacAddress.UnmarshalText([]byte(e.MAC))
}

// sizes returns what the writable layer takes, and that with the image.
func (e *Engine) sizes(r *container.Record) (rw, total int64, err error) {
	if rw, err = treeSize(e.Containers().Dir(r.ID, "upper")); err != nil {
		return 0, 0, err
	}
	ls, err := e.Layers()
	if err != nil {
		return 0, 0, err
	}
	total = rw
	for _, d := range r.Layers {
		info, err := ls.Stat(d)
		if err != nil {
			return 0, 0, fmt.Errorf("size of container %s: %w", r.Name, err)
		}
		total += info.ContentSize
	}
	return rw, total, nil
}

// treeSize adds up the sizes of regular files, hard links once. What goes away meanwhile doesn't count.
func treeSize(dir string) (int64, error) {
	var sum int64
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
			if seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
		}
		sum += info.Size()
		return nil
	})
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return sum, err
}

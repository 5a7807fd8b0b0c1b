package monitor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"
	"conex/internal/dns"
	"conex/internal/network"
	"conex/internal/portmap"
	"conex/internal/resolver"

	mevents "github.com/moby/moby/api/types/events"
	mnet "github.com/moby/moby/api/types/network"
)

// connect joins the networks and publishes the reserved ports, while the runtime makes the root file system.
func (r *run) connect(ctx context.Context, files string, links []link) error {
	m, hc := r.m, r.m.rec.HostConfig
	r.files, r.links = files, links
	if hc.NetworkMode.IsHost() || hc.NetworkMode.IsContainer() {
		return nil
	}
	if !m.bridged() {
		return m.nets.Loopback(r.ct.NetNS())
	}
	if err := r.openGate(); err != nil {
		return err
	}
	finish, err := r.openNames()
	if err != nil {
		return err
	}
	return finish(r.connectAll(ctx))
}

// connectAll joins the networks that the container is to be on, which may be none by now.
func (r *run) connectAll(ctx context.Context) error {
	m := r.m
	ats := m.attachments()
	if len(ats) == 0 {
		return m.nets.Loopback(r.ct.NetNS())
	}
	out, err := m.waysOut(ctx, ats)
	if err != nil {
		return err
	}
	for k, at := range ats {
		if _, err := r.attach(ctx, at, k, out); err != nil {
			return err
		}
	}
	if err := r.publish(ctx); err != nil {
		return err
	}
	m.watch()
	return m.writeFiles(r.files, r.eps, r.links)
}

// watch mends the network when somebody else has changed nf_tables: a firewall that starts or reloads may take our table along, or set a policy
// that containers can't live with. It begins with the first network and ends with the process: closing its socket at the end of a run
// would make others wait (netlink.AfterGrace), and Mend takes nothing that a settled container could miss. The caller holds m.changes.
func (m *monitor) watch() {
	if m.watched {
		return
	}
	m.watched = true
	go func() {
		err := portmap.Watch(context.Background(), func(at time.Time) {
			if err := m.nets.Mend(context.Background(), at); err != nil {
				complain("mend network", err)
			}
			m.calm()
		})
		if err != nil {
			complain("watch network", err)
		}
	}()
}

// attach joins one network, the attachment k.
func (r *run) attach(ctx context.Context, at container.Attachment, k int, out ways) (*network.Endpoint, error) {
	m := r.m
	i, err := m.networkOf(ctx, at)
	if err != nil {
		return nil, err
	}
	netns, err := r.netns()
	if err != nil {
		return nil, err
	}
	defer netns.Close()
	ep, err := m.nets.Attach(ctx, network.AttachRequest{
		ContainerID: m.rec.ID, Name: m.record().Name, Network: i.ID, NetNS: netns,
		Hostname: m.rec.Config.Hostname, ExtraHosts: m.rec.HostConfig.ExtraHosts, Exposed: exposed(m.rec),
		Settings: network.Settings{
			Interface: r.interfaceName(i, at), IPv4: at.IPv4, IPv6: at.IPv6, MAC: at.MAC, LinkLocal: at.LinkLocal, Aliases: at.Aliases,
			DriverOpts: at.DriverOpts, NoDefaultRoute: k != out.four, NoDefaultRoute6: k != out.six, Egress: r.gate.settings(),
		},
	})
	if err != nil {
		return nil, err
	}
	if k == out.main {
		r.eps = slices.Insert(r.eps, 0, ep)
	} else {
		r.eps = append(r.eps, ep)
	}
	if err := r.gate.add(ep.Filter); err != nil {
		return ep, err
	}
	m.networkEvent(mevents.ActionConnect, ep)
	return ep, nil
}

// exposed are the ports that the container says it serves, with those that it publishes.
func exposed(rec *container.Record) []string {
	var out []string
	for p := range rec.Config.ExposedPorts {
		out = append(out, p.String())
	}
	for p := range rec.HostConfig.PortBindings {
		if _, ok := rec.Config.ExposedPorts[p]; !ok {
			out = append(out, p.String())
		}
	}
	slices.Sort(out)
	return out
}

// networkOf finds the network of an attachment: the very one, or another that has its name by now.
func (m *monitor) networkOf(ctx context.Context, at container.Attachment) (network.Info, error) {
	if at.NetworkID != "" {
		if i, err := m.nets.Network(ctx, at.NetworkID); !errors.Is(err, network.ErrNotFound) {
			return i, err
		}
	}
	return m.nets.Network(ctx, at.Network)
}

// ways are the attachments that a container's ways out are on, -1 for none: the default routes, and where published ports lead.
type ways struct{ four, six, main int }

// waysOut says which of the attachments has the default route of each family: of those that have the family and lead anywhere the one of the
// highest priority, the first by name of equals.
func (m *monitor) waysOut(ctx context.Context, ats []container.Attachment) (ways, error) {
	w := ways{-1, -1, -1}
	better := func(k, than int) bool {
		if than < 0 {
			return true
		}
		a, b := &ats[k], &ats[than]
		return a.GwPriority > b.GwPriority || a.GwPriority == b.GwPriority && a.Network < b.Network
	}
	for k, at := range ats {
		i, err := m.networkOf(ctx, at)
		if err != nil {
			return w, err
		}
		if i.IPv4.Valid() && !i.Internal && better(k, w.four) {
			w.four = k
		}
		if i.IPv6.Valid() && !i.Internal && better(k, w.six) {
			w.six = k
		}
		if i.Internal && better(k, w.main) {
			w.main = k // if nothing leads out
		}
	}
	switch {
	case w.four >= 0:
		w.main = w.four
	case w.six >= 0:
		w.main = w.six
	}
	return w, nil
}

// mappings lists the ports to publish, sorted.
func mappings(rec *container.Record) ([]portmap.Mapping, error) {
	var out []portmap.Mapping
	for p, bindings := range rec.HostConfig.PortBindings {
		if len(bindings) == 0 {
			bindings = []mnet.PortBinding{{}}
		}
		for _, b := range bindings {
			m := portmap.Mapping{Proto: string(p.Proto()), ContainerPort: p.Num(), HostIP: b.HostIP}
			if b.HostPort != "" {
				first, last, isRange := strings.Cut(b.HostPort, "-")
				n, err := strconv.ParseUint(first, 10, 16)
				if err != nil {
					return nil, fmt.Errorf("publish port: %q is not a port", b.HostPort)
				}
				m.HostPort = uint16(n)
				if isRange {
					if n, err = strconv.ParseUint(last, 10, 16); err != nil {
						return nil, fmt.Errorf("publish port: %q is not a range of ports", b.HostPort)
					}
					m.HostPortEnd = uint16(n)
				}
			}
			out = append(out, m)
		}
	}
	if rec.HostConfig.PublishAllPorts {
		for p := range rec.Config.ExposedPorts {
			if _, ok := rec.HostConfig.PortBindings[p]; !ok {
				out = append(out, portmap.Mapping{Proto: string(p.Proto()), ContainerPort: p.Num()})
			}
		}
	}
	slices.SortFunc(out, func(a, b portmap.Mapping) int {
		return cmp.Or(cmp.Compare(a.ContainerPort, b.ContainerPort), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.HostPort, b.HostPort))
	})
	return out, nil
}

// describe are endpoints in state.json's words.
func describe(eps []*network.Endpoint) []container.Endpoint {
	text := func(valid bool, v fmt.Stringer) string {
		if !valid {
			return ""
		}
		return v.String()
	}
	var out []container.Endpoint
	for _, ep := range eps {
		out = append(out, container.Endpoint{
			NetworkName: ep.NetworkName, NetworkID: ep.NetworkID, EndpointID: ep.EndpointID, Interface: ep.Interface, HostInterface: ep.HostInterface,
			Address: text(ep.Address.IsValid(), ep.Address), Gateway: text(ep.Gateway.IsValid(), ep.Gateway),
			Address6: text(ep.Address6.IsValid(), ep.Address6), Gateway6: text(ep.Gateway6.IsValid(), ep.Gateway6),
			MAC: ep.MAC, DefaultRoute: ep.DefaultRoute, DefaultRoute6: ep.DefaultRoute6, Names: ep.Names(), Ports: ep.Ports,
		})
	}
	return out
}

// writeFiles makes the content of hosts, hostname and resolv.conf. They are bind-mounted, so they are written in place. Without an
// endpoint yet, hosts lacks the container's own address.
func (m *monitor) writeFiles(dir string, eps []*network.Endpoint, links []link) error {
	hc := m.rec.HostConfig
	if eps == nil {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	var ips []netip.Addr
	var gateway netip.Addr
	for _, ep := range eps {
		ips = append(ips, ep.Address.Addr(), ep.Address6.Addr())
	}
	switch {
	case len(eps) > 0:
		gateway = eps[0].Gateway
		if !gateway.IsValid() {
			gateway = eps[0].Gateway6
		}
	case hc.NetworkMode.IsHost():
		gateway = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	var hosts []byte
	named := hc.ExtraHosts
	if eps != nil && len(eps) == 0 { // disconnected from all: no address leads to the host
		named = slices.DeleteFunc(slices.Clone(named), func(h string) bool { return strings.HasSuffix(h, ":"+resolver.HostGateway) })
	}
	extra, err := resolver.ExpandHosts(named, gateway)
	switch {
	case err == nil:
		lines := make([]string, len(links))
		for i, l := range links {
			lines[i] = l.hosts()
		}
		name := m.rec.Config.Hostname
		if d := m.rec.Config.Domainname; d != "" && name != "" {
			name += "." + d
		}
		hosts = resolver.Hosts(name, ips, extra, lines...)
	case eps != nil || hc.NetworkMode.IsHost() || hc.NetworkMode.IsNone():
		return err
	}
	if hc.NetworkMode.IsHost() && len(hc.ExtraHosts) == 0 {
		if b, err := os.ReadFile("/etc/hosts"); err == nil {
			hosts = b
		}
	}
	if err := writeInPlace(dir+"/hosts", hosts); err != nil {
		return err
	}
	if eps != nil {
		return nil // the others don't depend on it
	}
	if err := writeInPlace(dir+"/hostname", []byte(m.rec.Config.Hostname+"\n")); err != nil {
		return err
	}
	var servers []string
	for _, a := range hc.DNS {
		servers = append(servers, a.String())
	}
	if len(servers) == 0 {
		servers = m.req.DNS
	}
	search := hc.DNSSearch
	if len(search) == 0 {
		search = m.req.DNSSearch
	}
	var conf []byte
	switch {
	case m.bridged():
		conf, err = resolver.ConfigFor(dns.Address, resolver.HostFile, search, hc.DNSOptions)
	case hc.NetworkMode.IsHost() && len(servers)+len(search)+len(hc.DNSOptions) == 0:
		conf, err = os.ReadFile(resolver.HostFile)
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
	default:
		conf, err = resolver.Config(resolver.HostFile, servers, search, hc.DNSOptions)
	}
	if err != nil && !errors.Is(err, resolver.ErrNoNameserver) {
		return err
	}
	return writeInPlace(dir+"/resolv.conf", conf)
}

func writeInPlace(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// bridged reports whether a container has a network namespace of its own with networks in it, or to come: one that was made with --network none
// has them once it was disconnected from that.
func (m *monitor) bridged() bool {
	rec := m.current()
	mode := rec.HostConfig.NetworkMode
	return !mode.IsHost() && !mode.IsContainer() && (!mode.IsNone() || rec.Networks != nil)
}

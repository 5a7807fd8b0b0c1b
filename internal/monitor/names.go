package monitor

import (
	"cmp"
	"net/netip"
	"os"
	"strings"

	"conex/internal/config"
	"conex/internal/dns"
	"conex/internal/network"
	"conex/internal/resolver"
)

// nameService is a run's server at 127.0.0.11, and whom it knows.
type nameService struct {
	names  *network.Names
	server *dns.Server
	// netns is the container's network namespace, held where servers are asked from inside it; else nil.
	netns *os.File
}

// openNames makes the server's sockets, beside what else is done to the network. The function that it returns waits for them, and makes the
// server of them if the rest came off.
func (r *run) openNames() (finish func(failed error) error, err error) {
	netns, err := r.netns()
	if err != nil {
		return nil, err
	}
	var s *dns.Sockets
	done := make(chan error, 1)
	go func() { // ends at once; finish waits for it
		var err error
		s, err = dns.Open(netns)
		done <- err
	}()
	return func(failed error) error {
		err := <-done
		if err == nil && failed == nil {
			return r.startNames(s, netns)
		}
		netns.Close()
		if err == nil {
			s.Close()
		}
		return cmp.Or(failed, err)
	}, nil
}

// startNames starts the server. The sockets and netns are its own from now on.
func (r *run) startNames(s *dns.Sockets, netns *os.File) error {
	ns := &nameService{names: r.m.nets.Names(), netns: netns}
	ns.names.Exists = r.m.store.Named
	ns.names.Links = r.linkNames()
	ns.names.Join(r.eps)
	cfg, err := r.whomToAsk(ns)
	if err == nil && r.gate != nil {
		err = r.gate.begin(ns.names, r.m.rec.HostConfig.ExtraHosts)
	}
	if cfg.NetNS == nil || err != nil {
		netns.Close()
		ns.netns = nil
	}
	if err != nil {
		s.Close()
		return err
	}
	if ns.server, err = dns.Start(s, cfg); err != nil {
		return err
	}
	r.names = ns
	return nil
}

// whomToAsk says what the server asks others, and whom: what the container's owner, the engine's configuration and the gate say.
func (r *run) whomToAsk(ns *nameService) (dns.Config, error) {
	m, hc := r.m, r.m.rec.HostConfig
	cfg := dns.Config{Names: ns.names, Host: new(resolver.Servers).Current}
	var given []netip.Addr
	for _, a := range hc.DNS {
		if a != dns.Address { // which is what asks
			given = append(given, a)
		}
	}
	if len(m.req.DNS) > 0 {
		list := make([]netip.Addr, len(m.req.DNS))
		for k, a := range m.req.DNS {
			var err error
			if list[k], err = netip.ParseAddr(a); err != nil {
				return cfg, err
			}
		}
		cfg.Host = func() ([]netip.Addr, error) { return list, nil }
	}
	switch {
	case r.gate == nil && len(given) > 0:
		cfg.Given, cfg.NetNS = given, ns.netns
	case r.gate != nil:
		cfg.Asks, cfg.Learn = r.gate.asks, r.gate.learn
		if len(given) > 0 { // asked from inside, the servers would be a way out
			cfg.Host = func() ([]netip.Addr, error) { return given, nil }
		}
	}
	if len(m.req.DNSDomains) > 0 {
		cfg.Domains = map[string][]netip.AddrPort{}
	}
	for domain, servers := range m.req.DNSDomains {
		domain = strings.ToLower(strings.TrimSuffix(domain, "."))
		cfg.Domains[domain] = nil
		for _, a := range servers {
			at, err := config.ParseServer(a)
			if err != nil {
				return cfg, err
			}
			cfg.Domains[domain] = append(cfg.Domains[domain], at)
		}
	}
	return cfg, nil
}

// linkNames are the names that the container's links give to others.
func (r *run) linkNames() map[string]string {
	links := map[string]string{}
	for _, l := range r.m.rec.Options.Links {
		links[l.Alias] = l.ID
	}
	for _, at := range r.m.attachments() {
		for _, l := range at.Links {
			if name, alias, ok := strings.Cut(l, ":"); ok {
				links[alias] = strings.TrimPrefix(name, "/")
			}
		}
	}
	return links
}

// moved tells the name service that the container's networks have changed.
func (r *run) moved() {
	if r.names != nil {
		r.names.names.Join(r.eps)
	}
}

// stopNames ends the name service. Idempotent.
func (r *run) stopNames() error {
	if r.names == nil {
		return nil
	}
	err := r.names.server.Close()
	if r.names.netns != nil {
		r.names.netns.Close()
	}
	r.names = nil
	return err
}

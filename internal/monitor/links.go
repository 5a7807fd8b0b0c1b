package monitor

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"conex/internal/container"
	"conex/internal/network"

	mnet "github.com/moby/moby/api/types/network"
)

// link is another container that this one knows by a further name (--link), as it runs now.
type link struct {
	alias string
	ip    netip.Addr
	rec   *container.Record
}

// links looks the linked containers up, which must run on the bridge.
func (m *monitor) links() ([]link, error) {
	var out []link
	if err := m.markLinks(); err != nil {
		return nil, err
	}
	for _, l := range m.rec.Options.Links {
		k, err := m.link(l)
		if err != nil {
			return nil, err
		}
		out = append(out, k)
	}
	return out, nil
}

func (m *monitor) link(l container.Link) (link, error) {
	rec, err := m.store.Load(l.ID)
	if err != nil {
		return link{}, err
	}
	st, err := m.store.State(l.ID)
	if err != nil {
		return link{}, err
	}
	if st == nil || st.Status != container.Running {
		return link{}, fmt.Errorf("cannot link to a non running container: /%s AS /%s/%s", rec.Name, m.rec.Name, l.Alias)
	}
	ep := st.On(network.Bridge)
	if ep == nil {
		return link{}, fmt.Errorf("cannot link to /%s, as it does not belong to the default network", rec.Name)
	}
	p, err := netip.ParsePrefix(ep.Address)
	if err != nil {
		return link{}, fmt.Errorf("link to %s: %w", rec.Name, err)
	}
	return link{l.Alias, p.Addr(), rec}, nil
}

// hosts is the link's line for /etc/hosts.
func (l *link) hosts() string {
	names := l.alias + " " + l.rec.Config.Hostname
	if l.alias != l.rec.Name {
		names += " " + l.rec.Name
	}
	return fmt.Sprintf("%s\t%s\n", l.ip, names)
}

// env are Docker's variables for a link: where the other's ports are, and its own environment.
func (l *link) env(name string) []string {
	alias := strings.ToUpper(strings.ReplaceAll(l.alias, "-", "_"))
	var out []string
	set := func(key, format string, args ...any) {
		out = append(out, alias+"_"+key+"="+fmt.Sprintf(format, args...))
	}
	ports := slices.Collect(maps.Keys(l.rec.Config.ExposedPorts))
	slices.SortFunc(ports, func(a, b mnet.Port) int { // tcp comes before udp, and sctp too
		return cmp.Or(strings.Compare(byProto(a), byProto(b)), cmp.Compare(a.Num(), b.Num()))
	})
	url := func(p mnet.Port) string { return fmt.Sprintf("%s://%s:%d", p.Proto(), l.ip, p.Num()) }
	key := func(p mnet.Port) string {
		return fmt.Sprintf("PORT_%d_%s", p.Num(), strings.ToUpper(string(p.Proto())))
	}
	for i := 0; i < len(ports); {
		first, last := ports[i], ports[i]
		if i == 0 {
			set("PORT", "%s", url(first))
		}
		for ; i < len(ports) && ports[i].Proto() == first.Proto() && (ports[i] == first || ports[i].Num() == last.Num()+1); i++ {
			last = ports[i]
			set(key(last), "%s", url(last))
			set(key(last)+"_ADDR", "%s", l.ip)
			set(key(last)+"_PORT", "%d", last.Num())
			set(key(last)+"_PROTO", "%s", last.Proto())
		}
		if last != first {
			set(key(first)+"_START", "%s", url(first))
			set(key(first)+"_PORT_START", "%d", first.Num())
			set(key(first)+"_END", "%s", url(last))
			set(key(first)+"_PORT_END", "%d", last.Num())
		}
	}
	set("NAME", "/%s/%s", name, l.alias)
	for _, e := range l.rec.Config.Env {
		if k, v, ok := strings.Cut(e, "="); ok && k != "HOME" && k != "PATH" {
			set("ENV_"+k, "%s", v)
		}
	}
	return out
}

func byProto(p mnet.Port) string {
	if p.Proto() == mnet.TCP {
		return ""
	}
	return string(p.Proto())
}

package engine

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"conex/internal/egress"
	"conex/internal/events"

	mevents "github.com/moby/moby/api/types/events"
)

// Denial is what a container tried to reach and --egress did not let it.
type Denial struct {
	// Protocol is dns for a name that was not looked up, which is the Address then.
	Protocol string `json:"protocol"`
	Address  string `json:"address"`
	Port     int    `json:"port,omitempty"`
	// Host is the name under which the address had been looked up.
	Host string `json:"host,omitempty"`
	// Packets counts those of the last hour while the container runs, otherwise the events.
	Packets uint64 `json:"packets"`
}

// where is the denial's end as people write it.
func (d Denial) where() string {
	s := d.Address
	if d.Port != 0 {
		s = net.JoinHostPort(s, strconv.Itoa(d.Port))
	}
	switch {
	case d.Protocol == "dns":
		return "the name " + s
	case d.Host != "":
		s += " (" + d.Host + ")"
	}
	if d.Protocol != "tcp" {
		s += " by " + d.Protocol
	}
	return s
}

// denials are what a container was denied: by its filters' own counts as long as it runs, and by the events, which know names.
func (e *Engine) denials(ctx context.Context, id string) ([]Denial, error) {
	type key struct {
		protocol, address string
		port              int
	}
	byKey := map[key]*Denial{}
	err := events.Open(e.cfg.State).Read(ctx, events.ReadOptions{Filter: func(ev events.Event) bool {
		return ev.Type == mevents.ContainerEventType && ev.Action == "egress-denied" && ev.Actor.ID == id
	}}, func(ev events.Event) error {
		a := ev.Actor.Attributes
		port, _ := strconv.Atoi(a["port"]) // 0 without
		k := key{a["protocol"], a["address"], port}
		if byKey[k] == nil {
			byKey[k] = &Denial{Protocol: k.protocol, Address: k.address, Port: port}
		}
		byKey[k].Host = cmp.Or(a["host"], byKey[k].Host)
		byKey[k].Packets++
		return nil
	})
	if err != nil {
		return nil, err
	}
	list, err := e.Networks().Denied(id)
	if err != nil {
		return nil, err
	}
	for _, a := range list {
		k := key{a.Proto, a.Addr.String(), int(a.Port)}
		if byKey[k] == nil {
			byKey[k] = &Denial{Protocol: k.protocol, Address: k.address, Port: k.port}
		}
		byKey[k].Packets = a.Packets
	}
	var out []Denial
	for _, d := range byKey {
		out = append(out, *d)
	}
	slices.SortFunc(out, func(a, b Denial) int {
		return cmp.Or(cmp.Compare(b.Packets, a.Packets), cmp.Compare(a.Address, b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	return out, nil
}

// bounded says what the container may reach.
func (s *sentences) bounded(values []string) {
	l, err := egress.Parse(values)
	switch {
	case err != nil:
		s.add("Its --egress can't be read: %v.", err)
	case len(l) == 0:
		s.add("It may reach nothing, and answer (--egress deny).")
	default:
		words := make([]string, 0, toldDenials)
		for _, e := range l[:min(len(l), toldDenials)] {
			words = append(words, e.String())
		}
		more := ""
		if len(l) > toldDenials {
			more = fmt.Sprintf(" and %d more", len(l)-toldDenials)
		}
		s.add("It may reach %s%s (--egress).", strings.Join(words, ", "), more)
	}
}

// toldDenials is how many of them a paragraph names.
const toldDenials = 5

func (s *sentences) denied(list []Denial) {
	for i, d := range list {
		if i == toldDenials {
			s.add("And %d other destinations were denied.", len(list)-i)
			return
		}
		n := fmt.Sprintf("%d attempts", d.Packets)
		if d.Packets == 1 {
			n = "1 attempt"
		}
		if d.Protocol == "dns" {
			s.add("Denied by --egress: to look up %s.", d.where())
			continue
		}
		s.add("Denied by --egress: %s to %s.", n, d.where())
	}
}

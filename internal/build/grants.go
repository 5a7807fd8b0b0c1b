package build

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"conex/internal/resolver"

	"net/netip"
)

// Entitlements are what a RUN may ask for and the command line has to allow.
const (
	allowHostNetwork = "network.host"
	allowInsecure    = "security.insecure"
	allowDevice      = "device"
)

// grants are what the command line lets RUN steps have.
type grants struct {
	secrets map[string]*secret
	agents  map[string]*agentSource
	allow   map[string]bool
}

// newGrants checks what a request grants before anything is built: a file that can't be read is found now, not after an hour.
func newGrants(req *Request) (*grants, error) {
	g := &grants{secrets: map[string]*secret{}, agents: map[string]*agentSource{}, allow: map[string]bool{}}
	for _, id := range slices.Sorted(maps.Keys(req.Secrets)) {
		s, err := newSecret(id, req.Secrets[id])
		if err != nil {
			return nil, err
		}
		g.secrets[id] = s
	}
	for _, id := range slices.Sorted(maps.Keys(req.Agents)) {
		a, err := newAgentSource(req.Agents[id])
		if err != nil {
			return nil, fmt.Errorf("ssh agent %s: %w", id, err)
		}
		g.agents[id] = a
	}
	for _, a := range req.Allow {
		name, _, _ := strings.Cut(a, "=")
		switch {
		case a == allowHostNetwork, a == allowInsecure, name == allowDevice:
			g.allow[a] = true
		default:
			return nil, fmt.Errorf("unknown entitlement %s: there are %s, %s and %s", a, allowHostNetwork, allowInsecure, allowDevice)
		}
	}
	switch req.Network {
	case "host": // who gives it for all steps allows it to each
		g.allow[allowHostNetwork] = true
	case "", "default", "none":
	default:
		return nil, fmt.Errorf("network mode %q is not supported: a RUN has default, none or host", req.Network)
	}
	_, err := resolver.ExpandHosts(req.AddHosts, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	return g, err
}

// need is an error unless an entitlement is granted.
func (g *grants) need(name string) error {
	if g.allow[name] {
		return nil
	}
	return fmt.Errorf("%s is not allowed: give the build --allow %s if you trust this Dockerfile", name, name)
}

var errNotGiven = errors.New("not found")

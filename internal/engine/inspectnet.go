package engine

import (
	"net/netip"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
)

// ContainerDetail is the answer to `inspect`: the Engine API's, with the network's part as scripts know it.
//
// The API's own Go types hold addresses as netip.Addr, which a template prints as "invalid IP" where there is none, and have lost
// the top-level fields (.NetworkSettings.IPAddress) that scripts of ten years read.
type ContainerDetail struct {
	apic.InspectResponse
	// NetworkSettings stands in for the embedded one.
	NetworkSettings *NetworkDetail
	// Egress is what it may reach (--egress); conex's own.
	Egress []string `json:",omitempty"`
}

// NetworkDetail is a container's NetworkSettings. The fields after Ports describe its place in the default bridge.
type NetworkDetail struct {
	Bridge, SandboxID, SandboxKey string
	HairpinMode                   bool
	// Ports is by "80/tcp"; a port that is only exposed has no bindings.
	Ports                                        map[string][]HostPort
	EndpointID, Gateway, GlobalIPv6Address       string
	GlobalIPv6PrefixLen                          int
	IPAddress                                    string
	IPPrefixLen                                  int
	IPv6Gateway, MacAddress                      string
	LinkLocalIPv6Address                         string
	LinkLocalIPv6PrefixLen                       int
	SecondaryIPAddresses, SecondaryIPv6Addresses []string
	Networks                                     map[string]*EndpointDetail
}

// HostPort is where on the host a port is published.
type HostPort struct {
	HostIP   string `json:"HostIp"`
	HostPort string
}

// EndpointDetail is a container's place in one network.
type EndpointDetail struct {
	IPAMConfig            *mnet.EndpointIPAMConfig
	Links, Aliases        []string
	MacAddress            string
	DriverOpts            map[string]string
	GwPriority            int
	NetworkID, EndpointID string
	Gateway, IPAddress    string
	IPPrefixLen           int
	IPv6Gateway           string
	GlobalIPv6Address     string
	GlobalIPv6PrefixLen   int
	DNSNames              []string
}

// networkDetail turns the API's types into those of ContainerDetail.
func networkDetail(ports mnet.PortMap, nets map[string]*mnet.EndpointSettings) *NetworkDetail {
	d := &NetworkDetail{Ports: map[string][]HostPort{}, Networks: map[string]*EndpointDetail{}}
	for p, bs := range ports {
		var to []HostPort
		for _, b := range bs {
			to = append(to, HostPort{addrText(b.HostIP), b.HostPort})
		}
		d.Ports[p.String()] = to
	}
	for name, n := range nets {
		x := &EndpointDetail{
			IPAMConfig: n.IPAMConfig, Links: n.Links, Aliases: n.Aliases, MacAddress: n.MacAddress.String(), DriverOpts: n.DriverOpts,
			GwPriority: n.GwPriority, NetworkID: n.NetworkID, EndpointID: n.EndpointID, Gateway: addrText(n.Gateway),
			IPAddress: addrText(n.IPAddress), IPPrefixLen: n.IPPrefixLen, IPv6Gateway: addrText(n.IPv6Gateway),
			GlobalIPv6Address: addrText(n.GlobalIPv6Address), GlobalIPv6PrefixLen: n.GlobalIPv6PrefixLen, DNSNames: n.DNSNames,
		}
		d.Networks[name] = x
		if name == mnet.NetworkBridge {
			d.EndpointID, d.Gateway, d.IPAddress, d.IPPrefixLen, d.MacAddress = x.EndpointID, x.Gateway, x.IPAddress, x.IPPrefixLen, x.MacAddress
			d.IPv6Gateway, d.GlobalIPv6Address, d.GlobalIPv6PrefixLen = x.IPv6Gateway, x.GlobalIPv6Address, x.GlobalIPv6PrefixLen
		}
	}
	return d
}

// addrText is an address, or nothing where there is none.
func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

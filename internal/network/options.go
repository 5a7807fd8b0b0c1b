package network

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"conex/internal/linux/netlink"
)

// Options of networks, by Docker's names. Those of the bridge driver:
const (
	OptionBridgeName   = "com.docker.network.bridge.name"
	OptionMasquerade   = "com.docker.network.bridge.enable_ip_masquerade"
	OptionICC          = "com.docker.network.bridge.enable_icc"
	OptionBinding      = "com.docker.network.bridge.host_binding_ipv4"
	OptionInhibit      = "com.docker.network.bridge.inhibit_ipv4"
	OptionGatewayMode4 = "com.docker.network.bridge.gateway_mode_ipv4"
	OptionGatewayMode6 = "com.docker.network.bridge.gateway_mode_ipv6"
)

// Those of macvlan and ipvlan:
const (
	OptionParent      = "parent"
	OptionMacvlanMode = "macvlan_mode"
	OptionIPvlanMode  = "ipvlan_mode"
	OptionIPvlanFlag  = "ipvlan_flag"
)

// Those of all drivers:
const (
	OptionMTU         = "com.docker.network.driver.mtu"
	OptionIfacePrefix = "com.docker.network.container_iface_prefix"
	OptionIPv4        = "com.docker.network.enable_ipv4"
	OptionIPv6        = "com.docker.network.enable_ipv6"
)

// maxInterfaceName is IFNAMSIZ without its final zero.
const maxInterfaceName = 15

// modeIsolated is the gateway mode of an internal network without an address of the host's.
const modeIsolated = "isolated"

// optionCheck says what is wrong with an option's value.
type optionCheck func(i *Info, value string) error

func optionChecks(driver string) map[string]optionCheck {
	checks := map[string]optionCheck{OptionMTU: checkMTU, OptionIfacePrefix: checkIfacePrefix, OptionIPv4: checkBool, OptionIPv6: checkBool}
	refused := func(why string) optionCheck {
		return func(*Info, string) error { return errors.New("is refused: " + why) }
	}
	switch driver {
	case DriverBridge:
		maps.Copy(checks, map[string]optionCheck{
			OptionBridgeName: checkBridgeName, OptionMasquerade: checkBool, OptionICC: checkBool, OptionInhibit: checkBool,
			OptionBinding: checkBinding, OptionGatewayMode4: checkGatewayMode, OptionGatewayMode6: checkGatewayMode,
			"com.docker.network.bridge.default_bridge":          refused("the default network is conex's own"),
			"com.docker.network.bridge.trusted_host_interfaces": refused("no interface reaches a container around its published ports"),
			"com.docker.network.host_ipv4":                      refused("containers leave with the address of the interface that they leave by"),
			"com.docker.network.host_ipv6":                      refused("containers leave with the address of the interface that they leave by"),
		})
	case DriverMacvlan:
		checks[OptionParent] = checkParent
		checks[OptionMacvlanMode] = checkWord("requested macvlan mode '%s' is not valid, 'bridge' mode is the macvlan driver default", macvlanModes)
	case DriverIPvlan:
		checks[OptionParent] = checkParent
		checks[OptionIPvlanMode] = checkWord("requested ipvlan mode '%s' is not valid, 'l2' mode is the ipvlan driver default", ipvlanModes)
		checks[OptionIPvlanFlag] = checkWord("requested ipvlan flag '%s' is not valid, 'bridge' is the ipvlan driver default", ipvlanFlags)
	}
	return checks
}

// checkOptions refuses what a network's driver does not know or can't do. No option is ignored: it might have been a mistake in its name.
func checkOptions(i *Info) error {
	checks := optionChecks(i.Driver)
	for _, name := range slices.Sorted(maps.Keys(i.Options)) {
		check, ok := checks[name]
		if !ok {
			return fmt.Errorf("option %s is not known to the %s driver: see docs/compat.md for those that are", name, i.Driver)
		}
		if err := check(i, i.Options[name]); err != nil {
			var w *wordError
			if errors.As(err, &w) {
				return err
			}
			return fmt.Errorf("option %s: %w", name, err)
		}
	}
	if i.isolated() && !i.Internal {
		return fmt.Errorf("option %s: isolated is for internal networks: add --internal", OptionGatewayMode4)
	}
	return nil
}

// wordError is an error that needs no option before it.
type wordError struct{ text string }

func (e *wordError) Error() string { return e.text }

func checkWord[T any](format string, words map[string]T) optionCheck {
	return func(_ *Info, v string) error {
		if _, ok := words[v]; !ok {
			return &wordError{fmt.Sprintf(format, v)}
		}
		return nil
	}
}

func checkBool(_ *Info, v string) error {
	if _, err := strconv.ParseBool(v); err != nil {
		return fmt.Errorf("failed to parse value: %s (it is true or false)", v)
	}
	return nil
}

func checkMTU(_ *Info, v string) error {
	n, err := strconv.Atoi(v)
	switch {
	case err != nil:
		return fmt.Errorf("failed to parse value: %s (it is a number)", v)
	case n != 0 && n < 68 || n > 65535: // RFC 791
		return fmt.Errorf("invalid MTU %d: it is 68 to 65535", n)
	}
	return nil
}

func checkBinding(_ *Info, v string) error {
	if a, err := netip.ParseAddr(v); err != nil || !a.Is4() {
		return fmt.Errorf("failed to parse value: %s (it is an IPv4 address)", v)
	}
	return nil
}

func checkIfacePrefix(_ *Info, v string) error {
	if v == "lo" || len(v) > maxInterfaceName-2 || !validInterface(v) {
		return fmt.Errorf("%q can't begin an interface's name", v)
	}
	return nil
}

func checkBridgeName(_ *Info, v string) error {
	switch {
	case !validInterface(v):
		return fmt.Errorf("%q can't name an interface: 1 to %d characters, no blanks and no slashes", v, maxInterfaceName)
	case ours(v):
		return fmt.Errorf("%s is a name that conex gives itself", v)
	}
	if _, err := net.InterfaceByName(v); err == nil {
		return fmt.Errorf("bridge name %s is taken by an interface of this host", v)
	}
	return nil
}

func validInterface(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= maxInterfaceName &&
		!strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == '/' || r == ':' || r == '%' || r >= 0x7f })
}

func checkGatewayMode(_ *Info, v string) error {
	switch v {
	case "nat", modeIsolated:
		return nil
	case "routed", "nat-unprotected":
		return fmt.Errorf("%s is refused: containers are reached through published ports alone", v)
	}
	return fmt.Errorf("unknown gateway mode %s: it is nat or isolated", v)
}

// flag is a switch among the network's options.
func (i Info) flag(name string, def bool) bool {
	if v, err := strconv.ParseBool(i.Options[name]); err == nil {
		return v
	}
	return def
}

// isolated reports whether the host has no address on the network.
func (i Info) isolated() bool {
	return i.Options[OptionGatewayMode4] == modeIsolated || i.Options[OptionGatewayMode6] == modeIsolated
}

// hostAddresses are the bridge's own: the gateways, unless the network's options keep the host off it.
func (i Info) hostAddresses() []netip.Prefix {
	var out []netip.Prefix
	add := func(p Pool, off bool) {
		if p.Valid() && !off {
			out = append(out, netip.PrefixFrom(p.Gateway, p.Subnet.Bits()))
		}
	}
	add(i.IPv4, i.Options[OptionGatewayMode4] == modeIsolated || i.flag(OptionInhibit, false))
	add(i.IPv6, i.Options[OptionGatewayMode6] == modeIsolated)
	return out
}

// Prefix begins the names of interfaces inside containers.
func (i Info) Prefix() string {
	if v := i.Options[OptionIfacePrefix]; v != "" {
		return v
	}
	return "eth"
}

// Binding is the host's address that ports are published on when none is named; the zero address means all.
func (i Info) Binding() netip.Addr {
	a, err := netip.ParseAddr(i.Options[OptionBinding])
	if err != nil || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

// Options of an endpoint (--driver-opt).
const (
	EndpointIfname  = "com.docker.network.endpoint.ifname"  // the interface's name inside
	EndpointSysctls = "com.docker.network.endpoint.sysctls" // net.ipv4.conf.IFNAME.log_martians=1, and more after commas
)

// CheckEndpointOptions refuses options of an endpoint that conex does not know, and values that make no sense.
func CheckEndpointOptions(opts map[string]string) error {
	for k, v := range opts {
		switch k {
		case EndpointIfname:
			if v == "lo" || !validInterface(v) {
				return fmt.Errorf("option %s: %q can't name an interface: 1 to %d characters, no blanks and no slashes", k, v, maxInterfaceName)
			}
		case EndpointSysctls:
			if _, err := endpointSysctls(v, "eth0"); err != nil {
				return fmt.Errorf("option %s: %w", k, err)
			}
		default:
			return fmt.Errorf("driver option %s is not known: there are %s and %s", k, EndpointIfname, EndpointSysctls)
		}
	}
	return nil
}

// endpointSysctls are the settings that an option asks for, as paths below /proc/sys/net and values.
func endpointSysctls(option, name string) ([][2]string, error) {
	var out [][2]string
	for s := range strings.SplitSeq(option, ",") {
		key, value, ok := strings.Cut(s, "=")
		parts := strings.Split(key, ".")
		if !ok || len(parts) != 5 || parts[0] != "net" || !slices.Contains([]string{"ipv4", "ipv6", "mpls"}, parts[1]) || !strings.EqualFold(parts[3], "ifname") {
			return nil, fmt.Errorf("unrecognised network interface sysctl '%s'; represent 'net.X.Y.ethN.Z=V' as 'net.X.Y.IFNAME.Z=V', 'X' must be 'ipv4', 'ipv6' or 'mpls'", s)
		}
		for _, p := range []string{parts[2], parts[4]} {
			if p == "" || strings.ContainsFunc(p, func(r rune) bool { return r != '_' && (r < 'a' || r > 'z') && (r < '0' || r > '9') }) {
				return nil, fmt.Errorf("unrecognised network interface sysctl '%s'", s)
			}
		}
		out = append(out, [2]string{strings.Join([]string{parts[1], parts[2], name, parts[4]}, "/"), value})
	}
	return out, nil
}

// applySysctls makes the settings that the endpoint's options ask for. It runs in the host's network namespace and enters the container's.
func applySysctls(ep *Endpoint, netns *os.File) error {
	option := ep.DriverOpts[EndpointSysctls]
	if option == "" {
		return nil
	}
	settings, err := endpointSysctls(option, ep.Interface)
	if err != nil {
		return err
	}
	return netlink.In(netns, func() error {
		for _, s := range settings {
			if err := writeSysctl(s[0], s[1]); err != nil {
				return fmt.Errorf("set %s: %w", s[0], err)
			}
		}
		return nil
	})
}

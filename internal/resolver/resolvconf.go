// Package resolver owns the files that tell programs about names: it reads the host's resolv.conf, and makes the content of a container's
// resolv.conf and hosts.
//
// Containers with a name service of their own (package dns) ask that. For what has none, a build's RUN and the host's network, the rules are
// Docker's for its default bridge: the host's name servers, less those that only the host can reach.
package resolver

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// HostFile is the host's resolver configuration.
const HostFile = "/etc/resolv.conf"

// systemdFile lists the real name servers where systemd-resolved keeps only its stub, 127.0.0.53, in HostFile.
const systemdFile = "/run/systemd/resolve/resolv.conf"

// systemdStub is the address of systemd-resolved's stub listener.
const systemdStub = "127.0.0.53"

// ErrNoNameserver is a warning: no name server of the host can be reached from a container, so the file names none and look-ups
// fail until --dns gives one. The content beside it is usable.
var ErrNoNameserver = errors.New("the host's name servers listen on its loopback only, a container can't reach them: use --dns")

// Config returns the content of a container's resolv.conf: the host's file, with name servers, search list and options
// replaced by those that are given. Name servers on loopback addresses are left out, and where hostFile lists nothing but
// systemd-resolved's stub, its upstream servers are taken instead. search of "." alone means no search list.
//
// The error is ErrNoNameserver, a warning that comes with content, or one that stops: a --dns that is no address, or a file
// that can't be read. A host without the file is a host without name servers.
func Config(hostFile string, dns, search, options []string) ([]byte, error) {
	return config(hostFile, systemdFile, dns, search, options)
}

func config(hostFile, stubFile string, dns, search, options []string) ([]byte, error) {
	host, err := read(hostFile)
	if err != nil {
		return nil, err
	}
	if len(dns) == 0 && slices.Equal(host.servers, []string{systemdStub}) {
		real, err := read(stubFile)
		if err != nil {
			return nil, err
		}
		if len(real.servers) > 0 {
			host = real
		}
	}
	servers := dns
	for _, s := range dns {
		if _, err := netip.ParseAddr(s); err != nil {
			return nil, fmt.Errorf("dns server %q is not an IP address", s)
		}
	}
	var warn error
	if len(dns) == 0 {
		servers = slices.DeleteFunc(host.servers, onlyHost)
		if len(servers) == 0 {
			warn = ErrNoNameserver
		}
	}
	b, err := host.content(servers, search, options)
	if err != nil {
		return nil, err
	}
	return b, warn
}

// ConfigFor returns the content of the resolv.conf of a container with a name service at server: the host's search list and options, unless
// others are given, and that every name is asked for as it is first, since names of containers have no dot.
func ConfigFor(server netip.Addr, hostFile string, search, options []string) ([]byte, error) {
	host, err := read(hostFile)
	if err != nil {
		return nil, err
	}
	if len(options) == 0 {
		options = host.options
	}
	if !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
		options = append(slices.Clone(options), "ndots:0")
	}
	return host.content([]string{server.String()}, search, options)
}

// content is a resolv.conf with what is given, and the host's search list and options where nothing is.
func (host parsed) content(servers, search, options []string) ([]byte, error) {
	if len(search) == 0 {
		search = host.search
	}
	if len(search) == 1 && search[0] == "." {
		search = nil
	}
	if len(options) == 0 {
		options = host.options
	}
	for _, s := range slices.Concat(search, options) {
		// A line break would let one value write other lines.
		if strings.ContainsAny(s, "\r\n\x00") {
			return nil, fmt.Errorf("dns option %q holds a line break", s)
		}
	}
	var b bytes.Buffer
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	if len(options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(options, " "))
	}
	return b.Bytes(), nil
}

// onlyHost reports whether a name server means another machine inside a container than on the host: a loopback address, or a
// link-local one, whose zone is the host's interface.
func onlyHost(s string) bool {
	a, err := netip.ParseAddr(s)
	return err != nil || a.Unmap().IsLoopback() || a.IsUnspecified() || a.Zone() != ""
}

// parsed is a resolv.conf as resolv.conf(5) reads it: of search and domain, and of options, the last line counts.
type parsed struct {
	servers, search, options []string
}

func read(file string) (parsed, error) {
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return parsed{}, fmt.Errorf("read resolver configuration: %w", err)
	}
	return parse(b), nil
}

func parse(b []byte) parsed {
	var p parsed
	for line := range bytes.Lines(b) {
		if len(line) > 0 && (line[0] == '#' || line[0] == ';') {
			continue
		}
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			// What is no address would be ignored by the C library, too.
			if _, err := netip.ParseAddr(f[1]); err == nil {
				p.servers = append(p.servers, f[1])
			}
		case "search", "domain":
			p.search = f[1:]
		case "options":
			p.options = f[1:]
		}
	}
	return p
}

// Nameservers are the host's own name servers, those behind systemd-resolved's stub when that is all (stub).
func Nameservers(hostFile string) (servers []netip.Addr, stub bool, err error) {
	host, err := read(hostFile)
	if err != nil {
		return nil, false, err
	}
	if slices.Equal(host.servers, []string{systemdStub}) {
		if real, err := read(systemdFile); err == nil && len(real.servers) > 0 {
			host, stub = real, true
		}
	}
	for _, s := range host.servers {
		if a, err := netip.ParseAddr(s); err == nil {
			servers = append(servers, a)
		}
	}
	return servers, stub, nil
}

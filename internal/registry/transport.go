package registry

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// transports sends each request by the TLS settings of the host that it goes to, wherever a redirect leads. The connections of one
// host are never another's, and so are its client certificates.
type transports struct {
	base *http.Transport
	dirs []string // with certificates, see HostDirs

	mu    sync.Mutex
	files map[string]tlsFiles        // by host, from hosts.toml
	made  map[string]*http.Transport // by host; base where nothing is set
	named map[string]bool            // hosts that the user or the administrator named
}

func newTransports(dirs []string) *transports {
	t := &transports{dirs: dirs, files: map[string]tlsFiles{}, made: map[string]*http.Transport{}, named: map[string]bool{}}
	t.base = http.DefaultTransport.(*http.Transport).Clone()
	t.base.DialContext = t.dial
	t.base.MaxIdleConnsPerHost = 8
	t.base.ResponseHeaderTimeout = time.Minute
	t.base.MaxResponseHeaderBytes = 256 << 10
	t.base.TLSHandshakeTimeout = 20 * time.Second
	t.base.DisableCompression = true // layers are compressed already, and their digests are of what is sent
	t.base.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	return t
}

// name says that a host is asked because the user or the administrator wants it, and with which certificates if hosts.toml says so.
func (t *transports) name(host string, files tlsFiles) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.named[host] = true
	if !files.empty() {
		t.files[host] = files
	}
}

// RoundTrip implements http.RoundTripper.
func (t *transports) RoundTrip(req *http.Request) (*http.Response, error) {
	tr := t.base
	if req.URL.Scheme == "https" {
		var err error
		if tr, err = t.of(req.URL.Host); err != nil {
			if req.Body != nil {
				req.Body.Close()
			}
			return nil, refused("%v", err)
		}
	}
	return tr.RoundTrip(req)
}

func (t *transports) of(host string) (*http.Transport, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if tr := t.made[host]; tr != nil {
		return tr, nil
	}
	files, ok := t.files[host]
	if !ok {
		var err error
		if files, err = certsOf(t.dirs, host); err != nil {
			return nil, err
		}
	}
	tr := t.base
	if !files.empty() {
		cfg, err := files.load()
		if err != nil {
			return nil, err
		}
		tr = t.base.Clone()
		tr.TLSClientConfig = cfg
	}
	t.made[host] = tr
	return tr, nil
}

// CloseIdleConnections is called by http.Client's.
func (t *transports) CloseIdleConnections() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.base.CloseIdleConnections()
	for _, tr := range t.made {
		tr.CloseIdleConnections()
	}
}

// dial connects. A host that only a registry has named must not lead to the machine's neighbours by its address: that is where clouds
// keep secrets for whoever asks from this machine.
func (t *transports) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	t.mu.Lock()
	named := t.named[addr] || t.named[strings.TrimSuffix(strings.TrimSuffix(addr, ":443"), ":80")]
	t.mu.Unlock()
	if !named {
		d.Control = func(_, address string, _ syscall.RawConn) error {
			if ap, err := netip.ParseAddrPort(address); err == nil && metadata(ap.Addr()) {
				return refused("refused to go on to %s (%s), which only this machine should reach", addr, ap.Addr())
			}
			return nil
		}
	}
	return d.DialContext(ctx, network, addr)
}

// metadata reports whether an address is link-local, or one where a cloud answers to its machines alone.
func metadata(a netip.Addr) bool {
	a = a.Unmap()
	if a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast() {
		return true
	}
	switch a.WithZone("").String() {
	case "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192":
		return true
	}
	return false
}

// mayLead says whether a registry may send us from one URL to another: never from https to http, since what a digest protects from changes
// would still tell everybody on the way what is fetched; and not to addresses that mean this machine or its link, unless we
// are there already.
func mayLead(from, to *url.URL) error {
	if to.Scheme != "https" && (to.Scheme != "http" || from.Scheme != "http") {
		return refused("refused a redirect from %s to %s://%s", from.Scheme, oneLine(to.Scheme), oneLine(to.Host))
	}
	if from.Host == to.Host {
		return nil
	}
	if a, err := netip.ParseAddr(to.Hostname()); err == nil && metadata(a) || isLoopback(to.Host) && !isLoopback(from.Host) {
		return refused("refused a redirect from %s to %s, which only this machine should reach", oneLine(from.Host), oneLine(to.Host))
	}
	return nil
}

// checkRedirect lets blobs move to a storage host. Credentials and the address that was asked stay behind.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxHops {
		return refused("stopped after %d redirects", maxHops)
	}
	if err := mayLead(via[len(via)-1].URL, req.URL); err != nil {
		return err
	}
	req.Header.Del("Referer")
	for _, v := range slices.Concat(via[1:], []*http.Request{req}) {
		// The http package lets them go along to subdomains and other ports, and all other headers anywhere.
		if v.URL.Host == via[0].URL.Host && v.URL.Scheme == via[0].URL.Scheme {
			continue
		}
		for k := range req.Header {
			if k != "Accept" && k != "Range" && k != "User-Agent" {
				req.Header.Del(k)
			}
		}
		break
	}
	return nil
}

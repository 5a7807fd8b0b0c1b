package registry

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"conex/internal/config"
	"conex/internal/ocispec"
)

// authority is a CA made for a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t}
	a.cert, a.key, a.pem = a.issue(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) issue(tmpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, []byte) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl.SerialNumber, tmpl.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: "test"}
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// leaf returns PEM files of a certificate for loopback addresses, usable on both sides.
func (a *authority) leaf() (cert, key []byte) {
	_, k, c := a.issue(&x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature})
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return c, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// put writes files below dir.
func files(t *testing.T, dir string, content map[string]string) string {
	t.Helper()
	for name, text := range content {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// at is a client with a folder of hosts' settings.
func at(cfg map[string]config.Registry, dirs ...string) *Client {
	c := New(Options{Registry: cfg, HostDirs: dirs})
	c.backoff = func(int) time.Duration { return 0 }
	return c
}

func TestTLS(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	cert, key := ca.leaf()
	clientCert, clientKey := ca.leaf()
	own := files(t, t.TempDir(), map[string]string{"cert": string(cert), "key": string(key), "ca": string(ca.pem)})
	host := dockerRegistry(t, "https", fmt.Sprintf("  tls: {certificate: %s/cert, key: %s/key, clientcas: [%s/ca]}\n", own, own, own))
	name, port, _ := strings.Cut(host, ":")
	pair := map[string]string{"ca.crt": string(ca.pem), "client.cert": string(clientCert), "client.key": string(clientKey)}
	in := func(folder string, files map[string]string) map[string]string {
		m := map[string]string{}
		for k, v := range files {
			m[folder+"/"+k] = v
		}
		return m
	}
	content, desc := random(100_000)
	for what, c := range map[string]struct {
		files map[string]string
		want  string // in the error, "" for none
	}{
		"docker's files":           {in(host, pair), ""},
		"containerd's folder name": {in(name+"_"+port+"_", pair), ""},
		"hosts.toml": {map[string]string{host + "/hosts.toml": "server = \"https://" + host + "\"\nca = \"x/ca.pem\"\nclient = [[\"x/c.pem\", \"x/k.pem\"]]\n",
			host + "/x/ca.pem": string(ca.pem), host + "/x/c.pem": string(clientCert), host + "/x/k.pem": string(clientKey)}, ""},
		"skip_verify": {map[string]string{host + "/hosts.toml": "server = \"https://" + host + "\"\nskip_verify = true\nclient = \"both.pem\"\n",
			host + "/both.pem": string(clientCert) + string(clientKey)}, ""},
		"nothing":             {nil, "/etc/conex/certs.d/" + host + "/ca.crt"},
		"another's CA":        {in(host, map[string]string{"ca.crt": string(other.pem), "client.cert": string(clientCert), "client.key": string(clientKey)}), "certificate"},
		"another host's":      {in("elsewhere:5000", pair), "certificate"},
		"no client's":         {in(host, map[string]string{"ca.crt": string(ca.pem)}), "registry https://"}, // by HTTP/2 the reason gets lost now and then
		"key missing":         {in(host, map[string]string{"client.cert": string(clientCert)}), "client.key is missing"},
		"certificate is none": {in(host, map[string]string{"ca.crt": "nonsense"}), "holds no certificate"},
		"pair does not fit":   {in(host, map[string]string{"ca.crt": string(ca.pem), "client.cert": string(clientCert), "client.key": string(key)}), "client certificate"},
	} {
		client := at(nil, files(t, t.TempDir(), c.files))
		ep, err := client.PushEndpoint(context.Background(), host, "a")
		if err == nil {
			err = client.PutBlob(context.Background(), ep, "a", knownBlob(content))
		}
		if err == nil {
			_, _, err = client.HasBlob(context.Background(), ep, "a", desc.Digest)
		}
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestHostsFile(t *testing.T) {
	h, err := parseHosts("/etc/x/hosts.toml", []byte(`
server = "https://registry-1.docker.io"
[host."https://z.example:5000"]
  capabilities = ["pull", "Resolve"]
  ca = ["/a.pem", "b.pem"]
  client = ["c.pem", ["d.pem", "e.pem"]]
  [host."https://z.example:5000".header]
    x-one = "1"
    x-two = ["1", "2"]
[host."http://a.example/v2/hub"]
  override_path = true
  skip_verify = true
  dial_timeout = "3s"
[host."m.example/sub"]
`))
	if err != nil || len(h.hosts) != 3 || h.server == nil || h.server.host != "registry-1.docker.io" {
		t.Fatalf("%+v, %v", h, err)
	}
	z, a, m := h.hosts[0], h.hosts[1], h.hosts[2]
	if z.host != "z.example:5000" || z.can != canPull|canResolve || fmt.Sprint(z.tls.ca) != "[/a.pem /etc/x/b.pem]" ||
		fmt.Sprint(z.tls.pairs) != "[[/etc/x/c.pem /etc/x/c.pem] [/etc/x/d.pem /etc/x/e.pem]]" || len(z.header["X-Two"]) != 2 {
		t.Errorf("%+v", z)
	}
	if a.base != "/v2/hub" || a.scheme != "http" || !a.tls.skip {
		t.Errorf("%+v", a)
	}
	if m.base != "/sub/v2" || m.scheme != "https" {
		t.Errorf("%+v", m)
	}
	for text, want := range map[string]string{
		"\n\nserver = 3":           ":3: ",
		"x = [":                    ":1: ",
		"[host.\"ftp://a\"]":       "is not of the form",
		"[host.\"https://u:p@a\"]": "is not of the form",
		"[host.\"https://a\"]\ncapabilities=[\"delete\"]":     `capability "delete"`,
		"[host.\"https://a\"]\nca=3":                          "ca: ",
		"[host.\"https://a\"]\nclient=[[\"a\",\"b\",\"c\"]]":  "client: ",
		"[host.\"https://a\".header]\nx=\"a\\r\\nb: c\"":      `header "x"`,
		"[host.\"https://a\".header]\nhost=\"other.example\"": `header "host"`,
		"server=\"nonsense://a\"":                             "server: ",
	} {
		if _, err := parseHosts("/f", []byte(text)); err == nil || !strings.HasPrefix(err.Error(), "/f:") || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestHostsEndpoints(t *testing.T) {
	dir := files(t, t.TempDir(), map[string]string{
		"docker.io/hosts.toml": "server=\"https://docker.io\"\n[host.\"https://m.example\"]\ncapabilities=[\"pull\"]\n[host.\"http://l.example/v2/x\"]\noverride_path=true\n",
		"_default/hosts.toml":  "[host.\"https://all.example\"]\n", "ro.example/hosts.toml": "capabilities=[\"pull\",\"resolve\"]\nserver=\"https://ro.example\"\n",
		"../escape/hosts.toml": "[host.\"https://escaped.example\"]\n",
	})
	cfg := map[string]config.Registry{
		"*": {Mirrors: []string{"https://p.example", "https://q.example/proxy/{registry}"}}, "own.example": {Mirrors: []string{"https://o.example/x"}}, "no.example": {Mirrors: []string{}},
	}
	for domain, want := range map[string]string{
		"docker.io":      "[https://p.example https://q.example/proxy/docker.io https://m.example http://l.example/v2/x https://registry-1.docker.io]",
		"own.example":    "[https://o.example/x https://all.example https://own.example]",
		"no.example":     "[https://all.example https://no.example]",
		"p.example":      "[https://q.example/proxy/p.example https://all.example https://p.example]",
		"else.example:5": "[https://p.example https://q.example/proxy/else.example_5 https://all.example https://else.example:5]",
		"../escape":      "[https://p.example https://q.example/proxy/../escape https://../escape]",
	} {
		c := at(cfg, dir)
		eps, err := c.endpoints(domain)
		if got := fmt.Sprint(eps); got != want || err != nil {
			t.Errorf("%s: %s, want %s, %v", domain, got, want, err)
		}
	}
	c := at(cfg, dir)
	eps, _ := c.may("docker.io", canResolve)
	if got := fmt.Sprint(eps); strings.Contains(got, "m.example") {
		t.Errorf("m.example may not be asked for tags: %s", got)
	}
	eps, _ = c.may("docker.io", canPull)
	for want, ep := range map[string]Endpoint{
		"https://p.example/v2/library/nginx/blobs/x?ns=docker.io":    eps[0],
		"https://q.example/v2/proxy/docker.io/library/nginx/blobs/x": eps[1],
		"https://m.example/v2/library/nginx/blobs/x?ns=docker.io":    eps[2],
		"http://l.example/v2/x/library/nginx/blobs/x?ns=docker.io":   eps[3],
		"https://registry-1.docker.io/v2/library/nginx/blobs/x":      eps[4],
	} {
		if got := ep.url("library/nginx", "blobs", "x"); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if _, err := c.PushEndpoint(context.Background(), "ro.example", "a"); err == nil || !strings.Contains(err.Error(), "hosts.toml") {
		t.Errorf("push to a registry that is only to be read: %v", err)
	}
	if ep, err := c.PushEndpoint(context.Background(), "docker.io", "a"); err != nil || ep.String() != "https://registry-1.docker.io" {
		t.Errorf("%s, %v", ep, err)
	}
}

// TestPullThrough has one proxy for all registries, which says what it was asked for, and adds a header.
func TestPullThrough(t *testing.T) {
	manifest := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{}}`
	proxy := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("ns") != "far.example" || r.Header.Get("X-Team") != "7" {
			t.Errorf("asked for %s with %v", r.URL, r.Header)
		}
		io.WriteString(w, manifest)
	}))
	dir := files(t, t.TempDir(), map[string]string{"_default/hosts.toml": "[host.\"http://" + proxy + "\"]\n[host.\"http://" + proxy + "\".header]\nX-Team=\"7\"\n"})
	_, _, ep, err := at(nil, dir).Resolve(context.Background(), "far.example", "a", "v1")
	if err != nil || ep.Host != proxy || !ep.Mirror {
		t.Fatalf("%+v, %v", ep, err)
	}
}

// TestIncompleteMirror has a mirror with the index and manifest but without a blob, or that breaks off in the middle of one.
func TestIncompleteMirror(t *testing.T) {
	full := serve(t, memory())
	manifest, blob, desc := fill(t, full, "a", "v1", 1<<20)
	fill(t, full, "a", "v2", 10)
	index := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[]}`, ocispec.MediaTypeImageIndex)
	for name, h := range map[string]http.HandlerFunc{
		"missing": http.NotFound,
		"denied":  func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) },
		"breaks": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(503)
				return
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
			w.Write(blob[:500_000])
		},
	} {
		var asked atomic.Int32
		mirror := lie(t, func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/v1") {
				io.WriteString(w, index)
				return
			}
			http.NotFound(w, r)
		}, func(w http.ResponseWriter, r *http.Request) { asked.Add(1); h(w, r) })
		c := client(map[string]config.Registry{full: {Mirrors: []string{"http://" + mirror}, PlainHTTP: true}})
		ctx := context.Background()
		_, _, ep, err := c.Resolve(ctx, full, "a", "v1")
		if err != nil || ep.Host != mirror {
			t.Fatalf("%s: %s, %v", name, ep, err)
		}
		if raw, err := c.Manifest(ctx, ep, "a", ocispec.Descriptor{Digest: ocispec.FromBytes(manifest)}); err != nil || !bytes.Equal(raw, manifest) {
			t.Errorf("%s: manifest: %v", name, err)
		}
		rc, err := c.Blob(ctx, ep, "a", desc)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := io.ReadAll(rc)
		rc.Close()
		if err != nil || !bytes.Equal(got, blob) || asked.Load() == 0 {
			t.Errorf("%s: %d bytes, mirror asked %d times, %v", name, len(got), asked.Load(), err)
		}
		_, absent := random(10)
		if _, err := c.Blob(ctx, ep, "a", absent); err == nil || !strings.Contains(err.Error(), mirror) || !strings.Contains(err.Error(), full) {
			t.Errorf("%s: nobody has it: %v", name, err)
		}
	}
}

// TestTLSIsPerHost has a registry with client certificates whose blobs lie at another host: that one must not see them.
func TestTLSIsPerHost(t *testing.T) {
	ca := newAuthority(t)
	cert, key := ca.leaf()
	seen := make(chan int, 10)
	storage := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { seen <- len(r.TLS.PeerCertificates) }))
	storage.Config.ErrorLog = log.New(io.Discard, "", 0)
	cfg, err := tlsFiles{pairs: [][2]string{{filepath.Join(files(t, t.TempDir(), map[string]string{"p": string(cert) + string(key)}), "p"), ""}}}.withKeys().load()
	if err != nil {
		t.Fatal(err)
	}
	cfg.ClientAuth = 1 // asked for, not required
	storage.TLS = cfg
	storage.StartTLS()
	t.Cleanup(storage.Close)
	front := httptest.NewUnstartedServer(http.RedirectHandler(storage.URL+"/blob", http.StatusFound))
	front.TLS = cfg.Clone()
	front.StartTLS()
	t.Cleanup(front.Close)
	a, b := strings.TrimPrefix(front.URL, "https://"), strings.TrimPrefix(storage.URL, "https://")
	dir := files(t, t.TempDir(), map[string]string{a + "/ca.crt": string(ca.pem), a + "/c.cert": string(cert), a + "/c.key": string(key), b + "/ca.crt": string(ca.pem)})
	_, _, err = at(nil, dir).HasBlob(context.Background(), Endpoint{Scheme: "https", Host: a}, "x", ocispec.FromBytes(nil))
	if err != nil {
		t.Fatal(err)
	}
	if n := <-seen; n != 0 {
		t.Errorf("the storage host saw %d certificates", n)
	}
}

// withKeys gives files that hold certificate and key their second name.
func (f tlsFiles) withKeys() tlsFiles {
	for i := range f.pairs {
		f.pairs[i][1] = f.pairs[i][0]
	}
	return f
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, " 7 ": 7 * time.Second, "-1": 0, "99999999999": 1 << 20 * time.Second, "x": 0, "99999999999999999999": 0,
		now.Add(time.Minute).Format(http.TimeFormat): time.Minute, now.Add(-time.Minute).Format(http.TimeFormat): 0,
	} {
		if got := after(in, now); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func FuzzHosts(f *testing.F) {
	f.Add([]byte("server=\"https://a\"\n[host.\"https://b\"]\nca=[\"x\"]\n"))
	f.Add([]byte("host.a.b.c=1\n[host.\"x\".header]\na=[1]\n"))
	f.Add([]byte("[[host]]\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, err := parseHosts("/etc/certs.d/x/hosts.toml", raw)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Fatalf("%q", err)
			}
			return
		}
		for _, e := range h.hosts {
			if e.host == "" || e.scheme != "http" && e.scheme != "https" {
				t.Fatalf("%+v", e)
			}
		}
	})
}

func FuzzNextLink(f *testing.F) {
	f.Add(`</v2/_catalog?last=b&n=2>; rel="next"`)
	f.Fuzz(func(t *testing.T, s string) {
		if target := nextLink([]string{s}); target != "" {
			if to, err := follow("https://a.example/v2/", target); err == nil && !strings.HasPrefix(to, "https://") {
				t.Fatalf("%q leads to %q", s, to)
			}
		}
	})
}

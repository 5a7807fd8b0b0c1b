package resolver

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestConfig(t *testing.T) {
	const systemd = "nameserver 192.0.2.53\nsearch corp.example\n"
	for _, c := range []struct {
		name, host           string
		dns, search, options []string
		want                 string
		warn                 bool
	}{
		{name: "as it is", host: "# by hand\nnameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch a.example b.example\noptions ndots:2 timeout:1\n",
			want: "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch a.example b.example\noptions ndots:2 timeout:1\n"},
		{name: "loopback is left out", host: "nameserver 127.0.0.1\nnameserver ::1\nnameserver 192.0.2.1\n", want: "nameserver 192.0.2.1\n"},
		{name: "link-local is left out", host: "nameserver fe80::1%eth0\nnameserver 192.0.2.1\n", want: "nameserver 192.0.2.1\n"},
		{name: "systemd-resolved's stub", host: "nameserver 127.0.0.53\noptions edns0\nsearch lost.example\n", want: systemd},
		{name: "the stub and another", host: "nameserver 127.0.0.53\nnameserver 192.0.2.9\n", want: "nameserver 192.0.2.9\n"},
		{name: "nothing is left", host: "nameserver 127.0.0.1\nsearch a.example\n", want: "search a.example\n", warn: true},
		{name: "empty", host: "", want: "", warn: true},
		{name: "given dns", host: "nameserver 127.0.0.53\nsearch a.example\n", dns: []string{"127.0.0.1", "9.9.9.9"}, want: "nameserver 127.0.0.1\nnameserver 9.9.9.9\nsearch a.example\n"},
		{name: "given search and options", host: "nameserver 192.0.2.1\nsearch a.example\noptions ndots:5\n", search: []string{"x.example"}, options: []string{"rotate"},
			want: "nameserver 192.0.2.1\nsearch x.example\noptions rotate\n"},
		{name: "no search", host: "nameserver 192.0.2.1\ndomain a.example\n", search: []string{"."}, want: "nameserver 192.0.2.1\n"},
		{name: "last search wins, rubbish is skipped", host: "search a\ndomain b\nnameserver\nnameserver x y\n; comment\n \nnameserver 192.0.2.1 # here\n", want: "nameserver 192.0.2.1\nsearch b\n"},
		{name: "no line break at the end", host: "nameserver 192.0.2.1", want: "nameserver 192.0.2.1\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			host, stub := filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "systemd")
			for file, content := range map[string]string{host: c.host, stub: systemd} {
				if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := config(host, stub, c.dns, c.search, c.options)
			if string(got) != c.want {
				t.Errorf("got\n%swant\n%s", got, c.want)
			}
			if c.warn != errors.Is(err, ErrNoNameserver) || !c.warn && err != nil {
				t.Errorf("error %v, warning wanted: %v", err, c.warn)
			}
		})
	}
	if got, err := Config(filepath.Join(t.TempDir(), "none"), nil, nil, nil); len(got) != 0 || !errors.Is(err, ErrNoNameserver) {
		t.Errorf("a host without the file: %q %v", got, err)
	}
	for _, bad := range [][3][]string{{{"dns.example"}, nil, nil}, {nil, {"a\nnameserver 6.6.6.6"}, nil}, {nil, nil, {"a\nb"}}} {
		if got, err := Config(filepath.Join(t.TempDir(), "none"), bad[0], bad[1], bad[2]); err == nil || errors.Is(err, ErrNoNameserver) {
			t.Errorf("%q was accepted: %q %v", bad, got, err)
		}
	}
}

func TestConfigFor(t *testing.T) {
	server := netip.MustParseAddr("127.0.0.11")
	for _, c := range []struct {
		name, host      string
		search, options []string
		want            string
	}{
		{name: "the host's list and options", host: "nameserver 192.0.2.1\nsearch a.example b.example\noptions edns0 trust-ad\n",
			want: "nameserver 127.0.0.11\nsearch a.example b.example\noptions edns0 trust-ad ndots:0\n"},
		{name: "the host's ndots", host: "options ndots:2\n", want: "nameserver 127.0.0.11\noptions ndots:2\n"},
		{name: "nothing", want: "nameserver 127.0.0.11\noptions ndots:0\n"},
		{name: "given", host: "search a.example\noptions edns0\n", search: []string{"x.example"}, options: []string{"rotate"}, want: "nameserver 127.0.0.11\nsearch x.example\noptions rotate ndots:0\n"},
		{name: "given ndots, no search", host: "search a.example\n", search: []string{"."}, options: []string{"ndots:5"}, want: "nameserver 127.0.0.11\noptions ndots:5\n"},
	} {
		host := filepath.Join(t.TempDir(), "resolv.conf")
		if err := os.WriteFile(host, []byte(c.host), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := ConfigFor(server, host, c.search, c.options); err != nil || string(got) != c.want {
			t.Errorf("%s: %v, got\n%swant\n%s", c.name, err, got, c.want)
		}
	}
	if got, err := ConfigFor(server, filepath.Join(t.TempDir(), "none"), nil, nil); err != nil || string(got) != "nameserver 127.0.0.11\noptions ndots:0\n" {
		t.Errorf("a host without the file: %q %v", got, err)
	}
	if got, err := ConfigFor(server, "/dev/null", []string{"a\nnameserver 6.6.6.6"}, nil); err == nil {
		t.Errorf("a line break was accepted: %q", got)
	}
}

// TestServers: the host's file is followed, whoever writes it and however.
func TestServers(t *testing.T) {
	s := Servers{File: filepath.Join(t.TempDir(), "resolv.conf")}
	want := func(addrs ...string) {
		t.Helper()
		got, err := s.Current()
		var text []string
		for _, a := range got {
			text = append(text, a.String())
		}
		if err != nil || !slices.Equal(text, addrs) {
			t.Errorf("servers %v %v, want %v", text, err, addrs)
		}
	}
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want()
	write(s.File, "nameserver 127.0.0.1\nnameserver fe80::1%eth0\nnameserver 127.0.0.1\n")
	want("127.0.0.1", "fe80::1%eth0")
	write(s.File, "nameserver 192.0.2.1\n")
	want("192.0.2.1")
	write(s.File, "nameserver 192.0.2.2\n")
	want("192.0.2.2")
	write(s.File+".new", "nameserver 192.0.2.3\n")
	if err := os.Rename(s.File+".new", s.File); err != nil {
		t.Fatal(err)
	}
	want("192.0.2.3")
	// A link, as systemd and NetworkManager make it.
	write(s.File+".real", "nameserver 192.0.2.4\n")
	if err := errors.Join(os.Remove(s.File), os.Symlink(s.File+".real", s.File)); err != nil {
		t.Fatal(err)
	}
	want("192.0.2.4")
	write(s.File+".real", "nameserver 192.0.2.5\n")
	want("192.0.2.5")
	if err := os.Remove(s.File); err != nil {
		t.Fatal(err)
	}
	want()
	if err := os.Mkdir(s.File, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Current(); err == nil {
		t.Error("a folder was read")
	}
	// Behind systemd-resolved's stub its own servers follow.
	s.File, s.Systemd = filepath.Join(t.TempDir(), "resolv.conf"), filepath.Join(t.TempDir(), "real")
	write(s.File, "nameserver 127.0.0.53\n")
	want("127.0.0.53")
	write(s.Systemd, "nameserver 192.0.2.7\nnameserver 192.0.2.8\n")
	want("127.0.0.53", "192.0.2.7", "192.0.2.8")
}

func TestHosts(t *testing.T) {
	const head = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
	ip := netip.MustParseAddr("172.30.0.2")
	extra, err := ExpandHosts([]string{"db:192.0.2.7", "me=host-gateway", "six:[2001:db8::1]", "seven:2001:db8::2"}, netip.MustParseAddr("172.30.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		ip    netip.Addr
		extra []string
		want  string
	}{
		{"web", ip, nil, head + "172.30.0.2\tweb\n"},
		{"web.example.com", ip, nil, head + "172.30.0.2\tweb.example.com web\n"},
		{"web", ip, extra, head + "192.0.2.7\tdb\n172.30.0.1\tme\n2001:db8::1\tsix\n2001:db8::2\tseven\n172.30.0.2\tweb\n"},
		{"web", netip.Addr{}, nil, head},
	} {
		if got := Hosts(c.name, []netip.Addr{c.ip}, c.extra); string(got) != c.want {
			t.Errorf("%s: got\n%swant\n%s", c.name, got, c.want)
		}
	}
	for _, bad := range []string{"", "x", "x:", ":1.2.3.4", "x:nowhere", "x y:1.2.3.4", "x\n6.6.6.6 bank:1.2.3.4", "x:1.2.3.4\ny"} {
		if out, err := ExpandHosts([]string{bad}, ip); err == nil {
			t.Errorf("%q was accepted: %q", bad, out)
		}
	}
	if _, err := ExpandHosts([]string{"x:host-gateway"}, netip.Addr{}); err == nil {
		t.Error("host-gateway without a gateway")
	}
}

// FuzzParse: whatever stands in the host's file, the container's has only lines that we know, and reads back as itself.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"nameserver 192.0.2.1\n", "search a b\noptions x\n", "nameserver 127.0.0.53\n", "domain\t\x00\n", "nameserver fe80::1%e\n"} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		host := filepath.Join(dir, "resolv.conf")
		if err := os.WriteFile(host, b, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := config(host, filepath.Join(dir, "none"), nil, nil, nil)
		if err != nil && !errors.Is(err, ErrNoNameserver) {
			return
		}
		for line := range bytes.Lines(got) {
			if key, _, _ := strings.Cut(string(line), " "); !slices.Contains([]string{"nameserver", "search", "options"}, key) {
				t.Errorf("line %q", line)
			}
		}
		for _, s := range parse(got).servers {
			if onlyHost(s) {
				t.Errorf("name server %s is the host's own", s)
			}
		}
	})
}

// FuzzHosts: no --add-host that is accepted writes more than its own line.
func FuzzHosts(f *testing.F) {
	f.Add("db:192.0.2.7")
	f.Add("x\v:::1")
	f.Fuzz(func(t *testing.T, e string) {
		extra, err := ExpandHosts([]string{e}, netip.MustParseAddr("172.30.0.1"))
		if err != nil {
			return
		}
		plain := bytes.Count(Hosts("h", nil, nil), []byte("\n"))
		got := Hosts("h", nil, extra)
		if bytes.Count(got, []byte("\n")) != plain+1 || bytes.ContainsAny(got, "\r\x00") {
			t.Errorf("%q wrote %q", e, got)
		}
	})
}

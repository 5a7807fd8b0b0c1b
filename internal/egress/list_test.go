package egress

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"deny", ""},
		{"allow=example.com", "example.com"},
		{"allow=Example.COM.:443", "example.com:443/tcp"},
		{"allow=example.com:443/udp,*.example.org", "example.com:443/udp *.example.org"},
		{"allow=db:5432", "db:5432/tcp"},
		{"allow=192.0.2.1", "192.0.2.1"},
		{"allow=192.0.2.1:53/udp", "192.0.2.1:53/udp"},
		{"allow=10.1.2.3/8", "10.0.0.0/8"},
		{"allow=10.0.0.0/8:53/udp", "10.0.0.0/8:53/udp"},
		{"allow=0.0.0.0/0:443", "0.0.0.0/0:443/tcp"},
		{"allow=2001:db8::1", "2001:db8::1"},
		{"allow=2001:db8::/32", "2001:db8::/32"},
		{"allow=[2001:db8::]/32", "2001:db8::/32"},
		{"allow=[2001:db8::]/32:443", "[2001:db8::]/32:443/tcp"},
		{"allow=[2001:db8::1]:443/sctp", "[2001:db8::1]:443/sctp"},
		{"allow=[2001:db8::1]", "2001:db8::1"},
		{"allow=a:1,a:1,b", "a:1/tcp b"},
	} {
		l, err := Parse([]string{c.in})
		var got []string
		for _, e := range l {
			got = append(got, e.String())
		}
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, %v, want %q", c.in, got, err, c.want)
		}
	}
	for _, bad := range []string{
		"", "allow", "allow=", "allow=,", "yes", "allow=a:0", "allow=a:65536", "allow=a:x", "allow=a:1/icmp", "allow=a/8", "allow=*", "allow=*.", "allow=a..b",
		"allow=10.0.0.0/33", "allow=10.0.0.0/8/tcp", "allow=[10.0.0.1]:1", "allow=[2001:db8::1", "allow=fe80::1%eth0", "allow=256.1.1.1", "allow=a b", "allow=exämple.com",
		"allow=::ffff:10.0.0.0/104", "allow=[::ffff:10.0.0.0]/104", "allow=a.*.b", "allow=" + strings.Repeat("a", 64), "allow=a\n",
	} {
		if l, err := Parse([]string{bad}); err == nil {
			t.Errorf("%q was taken as %v", bad, l)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: the error has a line break", bad)
		}
	}
	if _, err := Parse([]string{"deny", "allow=a"}); err == nil {
		t.Error("deny and allow= together were taken")
	}
	var many []string
	for i := range maxEntries + 1 {
		many = append(many, fmt.Sprintf("allow=192.0.2.1:%d", i+1))
	}
	if _, err := Parse(many); err == nil {
		t.Error("too many entries were taken")
	}
	if l, err := Parse(many[1:]); err != nil || len(l) != maxEntries {
		t.Errorf("%d entries, %v", len(l), err)
	}
}

func TestNames(t *testing.T) {
	l, err := Parse([]string{"allow=example.com:443,*.example.org,192.0.2.1"})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"example.com": true, "www.example.com": false, "a.example.org": true, "a.b.example.org": true, "example.org": false, "aexample.org": false, "": false, ".example.org": false,
	} {
		if l.Names(name) != want {
			t.Errorf("%q is listed: %t", name, !want)
		}
	}
	if got := l.Fixed(); !slices.Equal(got, []string{"example.com"}) {
		t.Errorf("fixed names %v", got)
	}
}

// FuzzParse wants that what is taken is taken again as it is shown.
func FuzzParse(f *testing.F) {
	f.Add("10.0.0.0/8:53/udp")
	f.Add("[2001:db8::]/32:443")
	f.Add("*.example.com:443/tcp")
	f.Fuzz(func(t *testing.T, s string) {
		l, err := Parse([]string{"allow=" + s})
		if err != nil {
			return
		}
		var parts []string
		for _, e := range l {
			parts = append(parts, e.String())
			if e.Name == "" && !e.Prefix.IsValid() {
				t.Fatalf("%q: an entry of nothing", s)
			}
		}
		again, err := Parse([]string{"allow=" + strings.Join(parts, ",")})
		if err != nil || !slices.Equal(l, again) {
			t.Fatalf("%q: %v, again %v, %v", s, l, again, err)
		}
	})
}

// FuzzTold reads log messages with packets that a container made.
func FuzzTold(f *testing.F) {
	p := append([]byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2}, 0, 1, 1, 0xbb)
	f.Add(p)
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 4, 17, 64}, make([]byte, 36)...))
	f.Add([]byte{0x4f})
	if a, ok := parsePacket(p); !ok || a.Addr != netip.MustParseAddr("192.0.2.2") || a.Port != 443 || a.Proto != "tcp" {
		f.Errorf("%+v, %t", a, ok)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, ok := parsePacket(b); ok && !a.Addr.IsValid() {
			t.Errorf("an attempt to nowhere: %+v", a)
		}
		parse(b)
	})
}

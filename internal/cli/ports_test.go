package cli

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/network"
)

func TestParsePublish(t *testing.T) {
	for _, tt := range []struct {
		specs string // separated by spaces
		want  string // the bindings as JSON, or the beginning of an error after "!"
	}{
		{"80", `{"80/tcp":[{"HostIp":"","HostPort":""}]}`},
		{"8080:80", `{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}`},
		{"8080:80/udp", `{"80/udp":[{"HostIp":"","HostPort":"8080"}]}`},
		{"8080:80/TCP", `{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}`},
		{"127.0.0.1:8080:80", `{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"8080"}]}`},
		{"127.0.0.1::80", `{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":""}]}`},
		{"[::1]:8080:80", `{"80/tcp":[{"HostIp":"::1","HostPort":"8080"}]}`},
		{"::1:8080:80", `{"80/tcp":[{"HostIp":"::1","HostPort":"8080"}]}`},
		{"[::]::80", `{"80/tcp":[{"HostIp":"::","HostPort":""}]}`},
		{"8000-8001:80-81", `{"80/tcp":[{"HostIp":"","HostPort":"8000"}],"81/tcp":[{"HostIp":"","HostPort":"8001"}]}`},
		{"80-81", `{"80/tcp":[{"HostIp":"","HostPort":""}],"81/tcp":[{"HostIp":"","HostPort":""}]}`},
		{"8000-8010:80", `{"80/tcp":[{"HostIp":"","HostPort":"8000-8010"}]}`},
		{"8080:80 8080:80", `{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}`},
		{"8080:80 8081:80", `{"80/tcp":[{"HostIp":"","HostPort":"8080"},{"HostIp":"","HostPort":"8081"}]}`},
		{"target=80,published=8080", `{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}`},
		{"target=80,protocol=udp", `{"80/udp":[{"HostIp":"","HostPort":""}]}`},
		{"8080:80/sctp", `{"80/sctp":[{"HostIp":"","HostPort":"8080"}]}`},
		{"65535:65535", `{"65535/tcp":[{"HostIp":"","HostPort":"65535"}]}`},
		{"65534-65535:65534-65535", `{"65534/tcp":[{"HostIp":"","HostPort":"65534"}],"65535/tcp":[{"HostIp":"","HostPort":"65535"}]}`},

		{"8080:", "!no port specified: 8080:<empty>"},
		{"8080:80/", "!invalid proto"},
		{"8080:80/icmp", "!invalid proto: icmp"},
		{"8080:http", "!invalid containerPort: http"},
		{"8080:0", "!invalid containerPort: 0"},
		{"web:80", "!invalid hostPort: web"},
		{"65536:80", "!invalid hostPort: 65536"},
		{"8080:65536", "!invalid containerPort: 65536"},
		{"-1:80", "!invalid hostPort: -1"},
		{"8010-8000:80", "!invalid hostPort: 8010-8000"},
		{"8000-8002:80-81", "!invalid ranges specified"},
		{"1.2.3:80:80", "!invalid IP address: 1.2.3"},
		{"[127.0.0.1]:80:80", "!invalid IP address"},
		{"localhost:80:80", "!invalid IP address: localhost"},
		{"published=80", "!missing mandatory field: target"},
		{"target=80,colour=red", "!invalid field key: colour"},
	} {
		exposed, bound := network.PortSet{}, network.PortMap{}
		err := parsePublish(strings.Fields(tt.specs), exposed, bound)
		if want, fails := strings.CutPrefix(tt.want, "!"); fails {
			if err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("-p %s: error %v, want %s", tt.specs, err, want)
			}
			continue
		}
		if err != nil {
			t.Errorf("-p %s: %v", tt.specs, err)
			continue
		}
		got, err := json.Marshal(bound)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != tt.want {
			t.Errorf("-p %s: %s, want %s", tt.specs, got, tt.want)
		}
		if len(exposed) != len(bound) {
			t.Errorf("-p %s: %d ports exposed, %d bound", tt.specs, len(exposed), len(bound))
		}
	}
}

func FuzzParsePublish(f *testing.F) {
	for _, s := range []string{"80", "[::1]:8000-8010:80-90/udp", "target=80,published=8080", "::", ":", "0-65535:0-65535"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		exposed, bound := network.PortSet{}, network.PortMap{}
		if parsePublish([]string{s}, exposed, bound) != nil {
			return
		}
		if len(bound) == 0 {
			t.Errorf("%q was taken and binds nothing", s)
		}
		for p := range bound {
			if _, ok := exposed[p]; !ok || p.Num() == 0 {
				t.Errorf("%q binds %s, which is not exposed or no port", s, p)
			}
		}
	})
}

func TestParseExpose(t *testing.T) {
	got := network.PortSet{}
	if err := parseExpose([]string{"80", "90-91/udp"}, got); err != nil || len(got) != 3 {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"8080:80", "x", "9-8", ""} {
		if err := parseExpose([]string{bad}, network.PortSet{}); err == nil {
			t.Errorf("--expose %q was taken", bad)
		}
	}
}

func TestPortLines(t *testing.T) {
	m := network.PortMap{}
	if err := parsePublish([]string{"8080:80", "127.0.0.1:53:53/udp", "[::1]:53:53/tcp"}, network.PortSet{}, m); err != nil {
		t.Fatal(err)
	}
	want := "53/tcp -> [::1]:53\n53/udp -> 127.0.0.1:53\n80/tcp -> 0.0.0.0:8080"
	if got := strings.Join(portLines(m), "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

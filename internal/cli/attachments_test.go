package cli

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func TestAttachments(t *testing.T) {
	for _, tt := range []struct {
		args string // separated by spaces
		want string // what becomes of them as JSON, or the beginning of an error after "!"
	}{
		{"", `[{"network":"default"}]`},
		{"--network n1", `[{"network":"n1"}]`},
		{"--net n1 --network n2", `[{"network":"n1"},{"network":"n2"}]`},
		{"--network name=n1", `[{"network":"n1"}]`},
		{"--network name=n1,alias=a,alias=b,ip=10.0.0.5,ip6=fd00::5,link-local-ip=169.254.1.1,driver-opt=k=v,gw-priority=-3",
			`[{"network":"n1","aliases":["a","b"],"ipv4":"10.0.0.5","ipv6":"fd00::5","linkLocal":["169.254.1.1"],"driverOpts":{"k":"v"},"gwPriority":-3}]`},
		{"--network n1 --network name=n2,alias=x --network-alias y --net-alias z --ip 10.0.0.9 --ip6 fd00::9 --mac-address 02:42:AC:11:00:09 --link a:b --link-local-ip fe80::9",
			`[{"network":"n1","aliases":["y","z"],"links":["a:b"],"ipv4":"10.0.0.9","ipv6":"fd00::9","mac":"02:42:ac:11:00:09","linkLocal":["fe80::9"]},{"network":"n2","aliases":["x"]}]`},
		{"--link a:b", `[{"network":"default"}]`},
		{"--mac-address 02:42:ac:11:00:09", `[{"network":"default","mac":"02:42:ac:11:00:09"}]`},
		{"--network NAME=n1,Alias=A", `[{"network":"n1","aliases":["A"]}]`},
		{"--network host --network none", `[{"network":"host"},{"network":"none"}]`}, // the engine refuses them
		{"--network container:x", `[{"network":"container:x"}]`},

		{"--network name=n1,alias", "!invalid argument \"name=n1,alias\" for \"--network\" flag: invalid field alias"},
		{"--network alias=a", "!invalid argument \"alias=a\" for \"--network\" flag: network name/id is not specified"},
		{"--network name=n1,ip=x", "!invalid argument"},
		{"--network name=n1,gw-priority=x", "!invalid argument \"name=n1,gw-priority=x\" for \"--network\" flag: invalid gw-priority (x): invalid syntax"},
		{"--network name=n1,driver-opt=k", "!invalid argument \"name=n1,driver-opt=k\" for \"--network\" flag: invalid key value pair format in driver options"},
		{"--network name=n1,mac-address=x", "!x is not a valid mac address"},
		{"--mac-address 02:42:ac:11:00:09:00:01", "!02:42:ac:11:00:09:00:01 is not a valid mac address"},
		{"--network n1 --network n1", `!network "n1" is specified multiple times`},
		{"--network n1 --network bridge", "!conflicting options: cannot attach both user-defined and non-user-defined network-modes"},
		{"--network name=n1,alias=x --network-alias y", "!conflicting options: cannot specify both --network-alias and per-network alias"},
		{"--network name=n1,ip=10.0.0.1 --ip 10.0.0.2", "!conflicting options: cannot specify both --ip and per-network IPv4 address"},
		{"--network name=n1,ip6=fd00::1 --ip6 fd00::2", "!conflicting options: cannot specify both --ip6 and per-network IPv6 address"},
		{"--network name=n1,mac-address=02:42:ac:11:00:09 --mac-address 02:42:ac:11:00:08", "!conflicting options: cannot specify both --mac-address and per-network MAC address"},
		{"--network name=n1,link-local-ip=fe80::1 --link-local-ip fe80::2", "!conflicting options: cannot specify both --link-local-ip and per-network link-local IP addresses"},
		{"--network-alias x", "!network-scoped aliases are only supported for user-defined networks"},
		{"--network none --network-alias x", "!network-scoped aliases are only supported for user-defined networks"},
	} {
		var c networkFlags
		f := pflag.NewFlagSet("", pflag.ContinueOnError)
		c.register(f)
		if err := f.Parse(strings.Fields(tt.args)); err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		got, err := c.attachments()
		if want, ok := strings.CutPrefix(tt.want, "!"); ok {
			if err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%s: error %v, want %q", tt.args, err, want)
			}
			continue
		}
		b, _ := json.Marshal(got)
		if err != nil || string(b) != tt.want {
			t.Errorf("%s:\n got %s %v\nwant %s", tt.args, b, err, tt.want)
		}
	}
}

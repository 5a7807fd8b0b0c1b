package plainjson

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// spec is what runc writes as an example, shortened, with some of what engines add.
const spec = `{
	"ociVersion": "1.2.0",
	"process": {
		"terminal": true, "consoleSize": {"height": 25, "width": 80}, "user": {"uid": 1000, "gid": 1000, "umask": 18, "additionalGids": [5, 6]},
		"args": ["sh", "-c", "echo \"\u003chi\u003e\"\n"], "env": ["PATH=/bin", "TERM=xterm", "NAME=é\ud83d\ude00"], "cwd": "/",
		"capabilities": {"bounding": ["CAP_KILL"], "effective": [], "ambient": null},
		"rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}], "noNewPrivileges": true, "oomScoreAdj": -100
	},
	"root": {"path": "rootfs", "readonly": true}, "hostname": "box",
	"mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}, {"destination": "/x"}],
	"annotations": {"a": "b", "c": ""}, "hooks": {"poststop": [{"path": "/bin/x", "args": ["x"], "timeout": 3}]},
	"linux": {
		"uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}], "sysctl": {"net.ipv4.ip_forward": "1"},
		"resources": {
			"devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": -1}],
			"memory": {"limit": 18446744073709551, "swap": -1}, "cpu": {"shares": 512, "cpus": "0-1"},
			"blockIO": {"weight": 10, "weightDevice": [{"major": 8, "minor": 0, "weight": 5}], "throttleReadBpsDevice": [{"major": 8, "minor": 1, "rate": 1}]},
			"unified": {"memory.high": "1"}
		},
		"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}], "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 0}],
		"seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 3, "op": "SCMP_CMP_EQ"}]}]},
		"maskedPaths": ["/proc/kcore"], "personality": {"domain": "LINUX"}, "timeOffsets": {"monotonic": {"secs": -3, "nanosecs": 4}}
	}
}`

type name string

type base struct {
	Deep  int `json:"deep"`
	Other map[name]*base
}

// all has a field of every kind that is handled, or left to encoding/json.
type all struct {
	base
	Bool    bool
	Small   int8
	Byte    uint8
	Float   float64
	Array   [2]int
	Any     any
	Bytes   []byte
	Raw     json.RawMessage
	Time    time.Time
	When    *time.Time
	Addr    netip.Addr
	ByAddr  map[netip.Addr]string
	ByInt   map[int]bool
	Quoted  int `json:",string"`
	Ignored int `json:"-"`
	Next    *all
	Lists   [][]string
	Twice   **int
	Strange int `json:"a b"`
}

// shadowing has a field in the place of an embedded structure's, before or after that.
type shadowing struct {
	Other int
	base
	Deep string `json:"deep"`
	more
}

type more struct {
	base
	More int
}

// ambiguous has two fields of a name.
type ambiguous struct {
	base
	other
}

type other struct {
	Other string
	DEEP  int
}

// same compares with encoding/json, for a target of type T.
func same[T any](t *testing.T, text string) {
	t.Helper()
	var got, want T
	err, werr := Unmarshal([]byte(text), &got), json.Unmarshal([]byte(text), &want)
	if fmt.Sprint(err) != fmt.Sprint(werr) || !reflect.DeepEqual(got, want) {
		t.Errorf("%T from %q:\n%+v, %v; want\n%+v, %v", got, text, got, err, want, werr)
	}
}

var texts = []string{
	``, ` `, `null`, `{}`, ` { } `, `[]`, `{`, `{}}`, `{"`, `{"deep"`, `{"deep":`, `{"deep":1`, `{"deep":1,}`, `{,}`, `{"deep":1 "Bool":true}`,
	`{"deep":1,"Other":{"x":{"deep":2},"y":null,"x":{"Other":{}}}}`, `{"DEEP":3}`, `{"deep":1,"deep":2}`, `{"deep":1.0}`, `{"deep":01}`, `{"deep":-0}`,
	`{"deep":-}`, `{"deep":1e2}`, `{"deep":9223372036854775808}`, `{"deep":"1"}`, `{"deep":null}`, `{"Small":128}`, `{"Small":-128}`, `{"Byte":-1}`,
	`{"Byte":255}`, `{"Bool":truex}`, `{"Bool":false , "Float":1.5e3}`, `{"Float":"x"}`, `{"Array":[1,2,3]}`, `{"Any":{"x":[1,{}]}}`, `{"Any":nulL}`,
	`{"Bytes":"aGk="}`, `{"Bytes":"!"}`, `{"Raw": {"a" : [ ] } }`, `{"Raw":null}`, `{"Time":"2020-01-02T03:04:05Z","When":null}`, `{"When":"x"}`,
	`{"Addr":"::1","ByAddr":{"::1":"x"},"ByInt":{"1":true}}`, `{"Addr":null}`, `{"ByAddr":{}}`, `{"ByAddr":null}`, `{"ByAddr":{"x":"y"}}`,
	`{"ByAddr":{"::1":"x","0::1":"y"}}`, `{"ByAddr":{"\u003a:1":"x","1.2.3.4":""}}`, `{"Array":[1]}`, `{"Array":[]}`, `{"Array":null}`, `{"Array":[1,"2"]}`,
	`{"Time":5}`, `{"Time":"x"}`, `{"Time":{"a": [1 ]}}`, `{"Quoted":"1"}`, `{"Ignored":1,"-":2,"Dash":3}`,
	`{"Next":{"Next":{"Lists":[["a","b"],[],null,["c"]]}}}`, `{"Lists":["a"]}`, `{"Lists":[["a",]]}`, `{"Lists":[["a"],["b"],["c"],["d"],["e"],["f"]]}`,
	`{"Twice":4}`, `{"a b":1,"Strange":2}`, `{"unknown":{"x":"}\"]","y":[{}]},"deep":1}`, `{"unknown":tru,"deep":1}`, `{"unknown":"` + "\x01" + `"}`,
	`{"unknown":}`, `{"unknown":"\"}`, `{"deep":1}x`, "{\"\xff\":1}", "{\"Lists\":[[\"\xff\"]]}", `{"Lists":[["\ud800","\u00e9\n","\x"]]}`, `{"unknown`,
	`{"Any":"` + "\u2028" + `"}`, strings.Repeat(`{"Next":`, 300) + "null" + strings.Repeat("}", 300), strings.Repeat(`[`, 20000), `"x"`, `1`, `true`,
	`{"linux":{"resources":{"blockIO":{"weightDevice":[{"MAJOR":1}]}}}}`, `{"process":[]}`, `{"mounts":{}}`, spec,
}

// TestSame: whatever the text, the result and the error are encoding/json's.
func TestSame(t *testing.T) {
	for _, text := range texts {
		same[all](t, text)
		same[ambiguous](t, text)
		same[shadowing](t, text)
		same[specs.Spec](t, text)
		same[*specs.Spec](t, text)
		same[[]string](t, text)
		same[string](t, text)
		same[any](t, text)
	}
}

func FuzzSame(f *testing.F) {
	for _, text := range texts {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		same[all](t, text)
		same[ambiguous](t, text)
		same[shadowing](t, text)
		same[specs.Spec](t, text)
	})
}

// TestPlain: what engines write needs no second look.
func TestPlain(t *testing.T) {
	d := decoder{text: []byte(spec)}
	var s specs.Spec
	if err := d.value(reflect.ValueOf(&s).Elem(), 0); err != nil || d.at != len(spec) {
		t.Errorf("%v after %q", err, spec[:d.at])
	}
}

// TestFilled: a target that holds something keeps what the text does not name.
func TestFilled(t *testing.T) {
	got := all{Small: 1, Lists: [][]string{{"x"}}}
	if err := Unmarshal([]byte(`{"Byte":2}`), &got); err != nil || got.Small != 1 || got.Byte != 2 || len(got.Lists) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, v := range []any{nil, all{}, (*all)(nil)} {
		if err := Unmarshal([]byte(`{}`), v); err == nil {
			t.Errorf("no error for a target %T", v)
		}
	}
}

package cli

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	apic "github.com/moby/moby/api/types/container"
	apii "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"

	"conex/internal/engine"
	"conex/internal/ocispec"
)

func list3(t *testing.T, format string) string {
	t.Helper()
	now := time.Unix(1700000000, 0)
	sums := []apic.Summary{
		{ID: strings.Repeat("ab", 32), Names: []string{"/web"}, Image: "nginx", Command: "nginx -g 'daemon off;' --and-more", Created: now.Unix() - 3600,
			State: "running", Status: "Up 59 minutes (healthy)", Labels: map[string]string{"tier": "web", "a": "b"},
			Health: &apic.HealthSummary{Status: apic.Healthy}, SizeRw: 2, SizeRootFs: 21500000,
			Ports:           []apic.PortSummary{{IP: netip.MustParseAddr("0.0.0.0"), PrivatePort: 80, PublicPort: 8080, Type: "tcp"}},
			NetworkSettings: &apic.NetworkSettingsSummary{Networks: map[string]*network.EndpointSettings{"bridge": nil}},
			Mounts:          []apic.MountPoint{{Source: "/a/rather/long/path"}, {Name: "vol", Driver: "local"}}},
		{ID: strings.Repeat("cd", 32), Names: []string{"/db"}, Image: "sha256:" + strings.Repeat("ef", 32), ImageID: "sha256:" + strings.Repeat("ef", 32),
			Created: now.Unix() - 60, State: "exited", Status: "Exited (0) 3 seconds ago"},
	}
	rows := make([]psRow, len(sums))
	for i := range sums {
		rows[i] = newPsRow(&engine.ContainerSummary{Summary: sums[i]}, true, now)
	}
	var b bytes.Buffer
	def := `{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.RunningFor}}\t{{.Status}}\t{{.Ports}}\t{{.Names}}`
	if err := writeList(&b, format, def, psHeadings(), rows); err != nil {
		return "error: " + err.Error()
	}
	return b.String()
}

func TestPsFormats(t *testing.T) {
	for _, tt := range []struct{ format, want string }{
		{"", "CONTAINER ID   IMAGE          COMMAND                  CREATED              STATUS                     PORTS                  NAMES\n" +
			"abababababab   nginx          \"nginx -g 'daemon of…\"   About an hour ago    Up 59 minutes (healthy)    0.0.0.0:8080->80/tcp   web\n" +
			"cdcdcdcdcdcd   efefefefefef   \"\"                       About a minute ago   Exited (0) 3 seconds ago                          db\n"},
		{"table {{.Names}}\t{{.State}}", "NAMES     STATE\nweb       running\ndb        exited\n"},
		{`table {{.Names}}\t{{.Label "com.example.some-tier"}}`, "NAMES     some tier\nweb       \ndb        \n"},
		{"{{.Names}}", "web\ndb\n"},
		{`{{.Names}}\t{{.Label "tier"}}`, "web\tweb\ndb\t\n"},
		{"{{.Labels}}|{{.Networks}}|{{.LocalVolumes}}|{{.Mounts}}", "a=b,tier=web|bridge|1|/a/rather/long…,vol\n||0|\n"},
		{"{{.Size}} {{.HealthStatus}}", "2B (virtual 21.5MB) healthy\n0B \n"},
		{"{{upper .Names}} {{title .State}} {{truncate .ID 4}}{{pad .Names 1 2}}.", "WEB Running abab web  .\nDB Exited cdcd db  .\n"},
		{`{{join (split .Names "e") "-"}} {{lower "X"}} {{println "y"}}`, "w-b x y\n\ndb x y\n\n"},
		{"{{json .Command}}", "\"\\\"nginx -g 'daemon of…\\\"\"\n\"\\\"\\\"\"\n"},
		{"{{.Nope}}", "error: template parsing error: :1:2: executing \"\" at <.Nope>: can't evaluate field Nope in type cli.psRow"},
		{"{{", "error: template parsing error: :1: unclosed action"},
	} {
		if got := list3(t, tt.format); got != tt.want {
			t.Errorf("%q:\ngot\n%s\nwant\n%s", tt.format, got, tt.want)
		}
	}
	got := list3(t, "json")
	if !strings.HasPrefix(got, `{"Command":"\"nginx`) || strings.Count(got, "\n") != 2 || !strings.Contains(got, `"Platform":null`) {
		t.Errorf("json: %s", got)
	}
}

func TestDisplayPorts(t *testing.T) {
	p := func(ip string, pub, priv uint16, typ string) apic.PortSummary {
		s := apic.PortSummary{PrivatePort: priv, PublicPort: pub, Type: typ}
		if ip != "" {
			s.IP = netip.MustParseAddr(ip)
		}
		return s
	}
	for _, tt := range []struct {
		ports []apic.PortSummary
		want  string
	}{
		{nil, ""},
		{[]apic.PortSummary{p("", 0, 80, "tcp")}, "80/tcp"},
		{[]apic.PortSummary{p("", 0, 81, "tcp"), p("", 0, 80, "tcp")}, "80-81/tcp"},
		{[]apic.PortSummary{p("0.0.0.0", 8080, 80, "tcp"), p("::", 8080, 80, "tcp")}, "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp"},
		{[]apic.PortSummary{p("0.0.0.0", 90, 90, "udp"), p("0.0.0.0", 91, 91, "udp"), p("0.0.0.0", 93, 93, "udp")}, "0.0.0.0:90-91->90-91/udp, 0.0.0.0:93->93/udp"},
		{[]apic.PortSummary{p("", 0, 53, "tcp"), p("", 0, 53, "udp"), p("", 0, 54, "tcp")}, "53-54/tcp, 53/udp"},
		{[]apic.PortSummary{p("127.0.0.1", 1000, 80, "tcp"), p("127.0.0.1", 1001, 81, "tcp")}, "127.0.0.1:1000->80/tcp, 127.0.0.1:1001->81/tcp"},
	} {
		if got := displayPorts(tt.ports); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

func TestImageRows(t *testing.T) {
	id := "sha256:" + strings.Repeat("ab", 32)
	now := time.Unix(1700000000, 0)
	for _, tt := range []struct {
		name    string
		sum     apii.Summary
		digests bool
		want    string
	}{
		{"two tags", apii.Summary{ID: id, RepoTags: []string{"a:1", "localhost:5000/b:2"}, Size: 1982000, SharedSize: -1, Containers: -1}, false, "a|1|<none>|abababababab|1.98MB\nlocalhost:5000/b|2|<none>|abababababab|1.98MB\n"},
		{"dangling", apii.Summary{ID: id}, false, "<none>|<none>|<none>|abababababab|0B\n"},
		{"pulled", apii.Summary{ID: id, RepoTags: []string{"a:1"}, RepoDigests: []string{"a@sha256:11", "a@sha256:22"}}, false, "a|1|sha256:11|abababababab|0B\n"},
		{"pulled, digests", apii.Summary{ID: id, RepoTags: []string{"a:1"}, RepoDigests: []string{"a@sha256:11", "a@sha256:22"}}, true, "a|1|sha256:11|abababababab|0B\na|1|sha256:22|abababababab|0B\n"},
		{"by digest alone", apii.Summary{ID: id, RepoDigests: []string{"b@sha256:33"}}, false, "b|<none>|sha256:33|abababababab|0B\n"},
		{"tag and other digest", apii.Summary{ID: id, RepoTags: []string{"a:1"}, RepoDigests: []string{"b@sha256:33"}}, false, "a|1|<none>|abababababab|0B\nb|<none>|sha256:33|abababababab|0B\n"},
	} {
		var b bytes.Buffer
		if err := writeList(&b, "{{.Repository}}|{{.Tag}}|{{.Digest}}|{{.ID}}|{{.Size}}", "", imageHeadings(), imageRows([]apii.Summary{tt.sum}, true, tt.digests, now)); err != nil {
			t.Fatal(err)
		}
		if b.String() != tt.want {
			t.Errorf("%s:\ngot\n%swant\n%s", tt.name, b.String(), tt.want)
		}
	}
}

func TestHistoryRows(t *testing.T) {
	now := time.Unix(1700000000, 0)
	items := []engine.HistoryItem{
		{HistoryResponseItem: apii.HistoryResponseItem{ID: "sha256:" + strings.Repeat("ab", 32), Created: now.Unix() - 7200,
			CreatedBy: "RUN /bin/sh -c a command of more than\tforty-five characters", Size: 12345}, Layer: ocispec.Digest("sha256:" + strings.Repeat("cd", 32)),
			SharedWith: []string{"a:1", "b:1", "c:1", "d:1"}},
		{HistoryResponseItem: apii.HistoryResponseItem{ID: "<missing>", Size: 0, Comment: "c", CreatedBy: "RUN a\r\nb\tc\n"}},
	}
	rows := historyRows(items, true, true, now)
	if r := rows[0]; r.ID != "abababababab" || r.CreatedSince != "2 hours ago" || r.Size != "12.3kB" || r.CreatedBy != "RUN /bin/sh -c a command of more than forty-…" ||
		r.Layer != "cdcdcdcdcdcd" || r.Shared != "true" || r.SharedWith != "a:1, b:1 and 2 more" {
		t.Errorf("%+v", r)
	}
	if r := rows[1]; r.ID != "<missing>" || r.CreatedSince != "N/A" || r.Size != "0B" || r.CreatedBy != "RUN a b c " || r.Shared != "false" || r.SharedWith != "" || r.Layer != "" {
		t.Errorf("%+v", r)
	}
	if r := historyRows(items, false, false, now)[0]; r.Size != "12345" || len(r.ID) != 71 || !strings.HasSuffix(r.CreatedBy, "characters") || r.SharedWith != "a:1, b:1, c:1, d:1" {
		t.Errorf("%+v", r)
	}
}

func TestInspectTemplates(t *testing.T) {
	v := apic.InspectResponse{ID: "abc", Name: "/x", State: &apic.State{Running: true}, Config: &apic.Config{Env: []string{"A=<b>"}, Labels: map[string]string{"k": "v"}}}
	for _, tt := range []struct{ format, want string }{
		{"{{.Name}} {{.State.Running}}", "/x true\n"},
		{"{{.Id}}", "abc\n"}, // JSON's name of it
		{"{{.ID}}", "abc\n"}, // Go's
		{"{{json .Config.Env}}", "[\"A=<b>\"]\n"},
		{"{{range $k, $v := .Config.Labels}}{{$k}}={{$v}}{{end}}", "k=v\n"},
		{`{{index .Config.Labels "k"}} {{join .Config.Env ","}}`, "v A=<b>\n"},
		{"{{.Nope.Deeper}}", "template parsing error: "},
	} {
		var b bytes.Buffer
		got := ""
		if err := writeOne(&b, tt.format, v); err != nil {
			got = err.Error()
		} else {
			got = b.String()
		}
		if got != tt.want && (!strings.HasPrefix(tt.want, "template") || !strings.HasPrefix(got, tt.want)) {
			t.Errorf("%s: got %q, want %q", tt.format, got, tt.want)
		}
	}
}

func TestDfRows(t *testing.T) {
	rows := dfRows(engine.DiskUsage{Images: engine.Usage{Total: 3, Active: 1, Size: 1000000, Reclaimable: 250000}})
	if r := rows[0]; r != (dfRow{Type: "Images", TotalCount: "3", Active: "1", Size: "1MB", SizeBytes: 1000000, Reclaimable: "250kB (25%)", ReclaimableBytes: 250000}) {
		t.Errorf("%+v", r)
	}
	if r := rows[3]; r.Type != "Build Cache" || r.Reclaimable != "0B" {
		t.Errorf("%+v", r)
	}
}

func TestPrintInfo(t *testing.T) {
	var b bytes.Buffer
	printInfo(&b, engine.Info{Driver: "erofs", DriverStatus: [][2]string{{"Reason", "because"}}, LoggingDriver: "json-file", LogLimits: "5 files",
		SecurityOptions: []string{"name=seccomp,profile=builtin"}, MemTotal: 8 << 30}, false)
	for _, want := range []string{"\n Storage Driver: erofs\n  Reason: because\n", "\n Logging Driver: json-file\n  Limits: 5 files\n", "\n  seccomp\n   Profile: builtin\n", "\n Total Memory: 8GiB\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"rnu", "run", 1}, {"imgaes", "images", 1}, {"p", "ps", 1}, {"abc", "xyz", 3}, {"", "abc", 3}} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("distance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

package cli

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/cobra"

	"conex/internal/engine"
	"conex/internal/image"
)

func (a *app) psCommand() *cobra.Command {
	var req engine.ListRequest
	var quiet, noTrunc bool
	var format string
	var filters filterFlag
	cmd := &cobra.Command{
		Use: "ps [OPTIONS]", Short: "List containers", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			req.Filters = filters.m
			// A template that shows sizes wants them measured.
			req.Size = req.Size || strings.Contains(format, ".Size")
			req.Latest = req.Latest && req.Last == -1
			req.Last = max(req.Last, 0)
			if err := a.checkPsFormat(&format, quiet); err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			sums, err := e.ListContainers(cmd.Context(), req)
			if err != nil {
				return err
			}
			rows := make([]psRow, len(sums))
			for i := range sums {
				rows[i] = newPsRow(&sums[i], !noTrunc, time.Now())
			}
			def := `{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.RunningFor}}\t{{.Status}}\t{{.Ports}}\t{{.Names}}`
			if req.Size {
				def += `\t{{.Size}}`
			}
			return writeList(a.out, format, def, psHeadings(), rows)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&req.All, "all", "a", false, "Show all containers (default shows just running)")
	f.VarP(&filters, "filter", "f", "Filter output based on conditions provided")
	f.StringVar(&format, "format", "", formatHelp)
	f.IntVarP(&req.Last, "last", "n", -1, "Show n last created containers (includes all states)")
	f.BoolVarP(&req.Latest, "latest", "l", false, "Show the latest created container (includes all states)")
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display container IDs")
	f.BoolVarP(&req.Size, "size", "s", false, "Display total file sizes")
	return cmd
}

// checkPsFormat refuses a template with a field that ps has not, also when there is no container to show it for, as Docker does. -q takes
// the place of a format.
func (a *app) checkPsFormat(format *string, quiet bool) error {
	if quiet && *format != "" {
		fmt.Fprintln(a.err, "WARNING: Ignoring custom format, because both --format and --quiet are set.")
	}
	if strings.Contains(*format, "{{") {
		t, err := parseTemplate(strings.TrimPrefix(*format, "table"))
		if err != nil {
			return err
		}
		if err := t.Execute(io.Discard, psRow{}); unknownField(err) {
			return templateError(err)
		}
	}
	if quiet {
		*format = "{{.ID}}"
	}
	return nil
}

const formatHelp = `Format output using a custom template: "table", "table TEMPLATE", "json" or "TEMPLATE" (a Go template)`

func psHeadings() headings {
	return headings{"ID": "CONTAINER ID", "Names": "NAMES", "Image": "IMAGE", "Command": "COMMAND", "CreatedAt": "CREATED AT", "RunningFor": "CREATED",
		"Ports": "PORTS", "State": "STATE", "Status": "STATUS", "Size": "SIZE", "Labels": "LABELS", "Mounts": "MOUNTS", "LocalVolumes": "LOCAL VOLUMES",
		"Networks": "NETWORKS", "Platform": "PLATFORM", "HealthStatus": "HEALTH STATUS", "Egress": "EGRESS"}
}

// psRow is a line of ps; its fields, in the order of their JSON form, are what templates may name.
type psRow struct {
	Command, CreatedAt                                                     string
	Egress                                                                 string `json:",omitempty"` // not Docker's
	HealthStatus, ID, Image, Labels, LocalVolumes, Mounts, Names, Networks string
	Platform                                                               *string // Docker's is null without platforms of images
	Ports, RunningFor, Size, State, Status                                 string

	labels map[string]string
}

// Label returns one label's value, "" if it is not set.
func (r psRow) Label(name string) string { return r.labels[name] }

func newPsRow(c *engine.ContainerSummary, trunc bool, now time.Time) psRow {
	created := time.Unix(c.Created, 0)
	r := psRow{
		ID: c.ID, Image: c.Image, Command: c.Command, CreatedAt: created.String(), RunningFor: units.HumanDuration(max(0, now.Sub(created))) + " ago",
		State: string(c.State), Status: c.Status, Ports: displayPorts(c.Ports), Labels: joinLabels(c.Labels), labels: c.Labels,
		Egress: strings.Join(c.Egress, " "),
	}
	if c.Health != nil && c.Health.Status != apic.NoHealthcheck {
		r.HealthStatus = string(c.Health.Status)
	}
	if trunc {
		r.ID, r.Command = short(c.ID), ellipsis(c.Command, 20)
		r.Image = shortImage(c)
	}
	r.Command = strconv.Quote(r.Command)
	if r.Image == "" {
		r.Image = "<no image>"
	}
	var names, mounts, networks []string
	for _, n := range c.Names {
		names = append(names, strings.TrimPrefix(n, "/"))
	}
	volumes := 0
	for _, m := range c.Mounts {
		n := cmp.Or(m.Name, m.Source)
		if trunc {
			n = ellipsis(n, 15)
		}
		mounts = append(mounts, n)
		if m.Driver == "local" {
			volumes++
		}
	}
	if c.NetworkSettings != nil {
		for n := range c.NetworkSettings.Networks {
			networks = append(networks, n)
		}
		slices.Sort(networks)
	}
	r.Names, r.Mounts, r.Networks, r.LocalVolumes = strings.Join(names, ","), strings.Join(mounts, ","), strings.Join(networks, ","), strconv.Itoa(volumes)
	r.Size = units.HumanSizeWithPrecision(float64(c.SizeRw), 3)
	if c.SizeRootFs > 0 {
		r.Size += fmt.Sprintf(" (virtual %s)", units.HumanSizeWithPrecision(float64(c.SizeRootFs), 3))
	}
	return r
}

// shortImage is the image's name as it was given, without a digest; an id is cut.
func shortImage(c *engine.ContainerSummary) string {
	if id := short(c.ImageID); id != "" && id == short(c.Image) {
		return id
	}
	if name, _, ok := strings.Cut(c.Image, "@"); ok {
		if ref, err := image.ParseReference(name); err == nil && !strings.HasSuffix(name, ":latest") {
			return strings.TrimSuffix(ref.Familiar(), ":latest")
		}
		return name
	}
	return c.Image
}

func joinLabels(m map[string]string) string {
	var l []string
	for k, v := range m {
		l = append(l, k+"="+v)
	}
	slices.Sort(l)
	return strings.Join(l, ",")
}

// displayPorts writes ports as ps shows them: published ones as 0.0.0.0:8080->80/tcp, the others as 80/tcp, and neighbours that are
// alike as one range.
func displayPorts(ports []apic.PortSummary) string {
	ports = slices.Clone(ports)
	slices.SortFunc(ports, func(x, y apic.PortSummary) int {
		return cmp.Or(cmp.Compare(x.PrivatePort, y.PrivatePort), strings.Compare(ipText(x), ipText(y)), cmp.Compare(x.PublicPort, y.PublicPort), strings.Compare(x.Type, y.Type))
	})
	type run struct {
		from, to apic.PortSummary
	}
	var runs []*run
	open := map[string]*run{} // the last run of a kind: an address, a protocol, a distance between host's and container's port
	for _, p := range ports {
		// Docker joins only ports that are the same on both sides.
		joinable := p.PublicPort == 0 || p.PublicPort == p.PrivatePort
		key := fmt.Sprintf("%s/%s/%v", ipText(p), p.Type, p.PublicPort == 0)
		if r := open[key]; joinable && r != nil && p.PrivatePort == r.to.PrivatePort+1 {
			r.to = p
			continue
		}
		r := &run{p, p}
		runs = append(runs, r)
		if joinable {
			open[key] = r
		}
	}
	// What is not published, or on the same port, comes first.
	slices.SortStableFunc(runs, func(x, y *run) int {
		other := func(r *run) bool { return r.from.PublicPort != 0 && r.from.PublicPort != r.from.PrivatePort }
		switch {
		case other(x) == other(y):
			return 0
		case other(x):
			return 1
		}
		return -1
	})
	text := make([]string, len(runs))
	for i, r := range runs {
		span := func(a, b uint16) string {
			if a == b {
				return strconv.Itoa(int(a))
			}
			return fmt.Sprintf("%d-%d", a, b)
		}
		text[i] = span(r.from.PrivatePort, r.to.PrivatePort) + "/" + r.from.Type
		if r.from.PublicPort != 0 {
			host := span(r.from.PublicPort, r.to.PublicPort)
			if ip := ipText(r.from); ip != "" {
				host = net.JoinHostPort(ip, host)
			}
			text[i] = host + "->" + text[i]
		}
	}
	return strings.Join(text, ", ")
}

func ipText(p apic.PortSummary) string {
	if !p.IP.IsValid() {
		return ""
	}
	return p.IP.String()
}

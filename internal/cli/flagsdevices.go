package cli

import (
	"encoding/csv"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"

	"conex/internal/engine"
)

// deviceFlags are the host's devices that the container may use.
type deviceFlags struct {
	device list
	gpus   gpusFlag
}

func (c *deviceFlags) register(f *pflag.FlagSet) {
	f.Var(&c.device, "device", "Add a host device to the container, by its path or CDI name")
	f.Var(&c.gpus, "gpus", "GPU devices to add to the container ('all' to pass all GPUs)")
}

func (c *deviceFlags) apply(t *flagTarget) error {
	var named []string
	for _, d := range c.device {
		if engine.IsCDIName(d) {
			named = append(named, d)
			continue
		}
		m, err := parseDevice(d)
		if err != nil {
			return err
		}
		t.host.Devices = append(t.host.Devices, m)
	}
	t.host.DeviceRequests = c.gpus
	if len(named) > 0 {
		t.host.DeviceRequests = append(t.host.DeviceRequests, apic.DeviceRequest{Driver: "cdi", DeviceIDs: named})
	}
	return nil
}

// parseDevice reads host[:container][:permissions].
func parseDevice(s string) (apic.DeviceMapping, error) {
	m := apic.DeviceMapping{CgroupPermissions: "rwm"}
	parts := strings.Split(s, ":")
	if len(parts) > 3 || parts[0] == "" {
		return m, fmt.Errorf("bad format for path: %s", s)
	}
	m.PathOnHost, m.PathInContainer = parts[0], parts[0]
	switch {
	case len(parts) == 3:
		if !engine.DevicePermissions(parts[2]) {
			return m, fmt.Errorf("bad mode specified: %s", parts[2])
		}
		m.PathInContainer, m.CgroupPermissions = parts[1], parts[2]
	case len(parts) == 2 && engine.DevicePermissions(parts[1]):
		m.CgroupPermissions = parts[1]
	case len(parts) == 2:
		m.PathInContainer = parts[1]
	}
	for _, p := range []string{m.PathInContainer, m.PathOnHost} {
		if !path.IsAbs(p) {
			return m, fmt.Errorf("%s is not an absolute path", p)
		}
	}
	m.PathOnHost, m.PathInContainer = path.Clean(m.PathOnHost), path.Clean(m.PathInContainer)
	return m, nil
}

// gpusFlag are requests for GPUs: a count or "all", or keys and values with commas between them.
type gpusFlag []apic.DeviceRequest

func (g *gpusFlag) Set(s string) error {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return err
	}
	r := apic.DeviceRequest{Options: map[string]string{}, Capabilities: [][]string{{"gpu"}}}
	seen := map[string]bool{}
	for _, field := range fields {
		key, val, ok := strings.Cut(field, "=")
		if !ok {
			key, val = "count", field
		}
		if seen[key] {
			return fmt.Errorf("gpu request key '%s' can be specified only once", key)
		}
		seen[key] = true
		switch key {
		case "driver":
			r.Driver = val
		case "count":
			if r.Count, err = gpuCount(val); err != nil {
				return err
			}
		case "device":
			r.DeviceIDs = strings.Split(val, ",")
		case "capabilities":
			r.Capabilities = [][]string{append(strings.Split(val, ","), "gpu")}
		case "options":
			opts, err := csv.NewReader(strings.NewReader(val)).Read()
			if err != nil {
				return fmt.Errorf("read gpu options: %w", err)
			}
			r.Options = keyValues(opts)
		default:
			return fmt.Errorf("unexpected key '%s' in '%s'", key, field)
		}
	}
	if !seen["count"] && r.DeviceIDs == nil {
		r.Count = 1
	}
	*g = append(*g, r)
	return nil
}
func (g *gpusFlag) Type() string   { return "gpu-request" }
func (g *gpusFlag) String() string { return "" }

func gpuCount(s string) (int, error) {
	if s == "all" {
		return -1, nil
	}
	n, err := strconv.Atoi(s)
	var ne *strconv.NumError
	if errors.As(err, &ne) {
		return 0, fmt.Errorf(`invalid count (%s): value must be either "all" or an integer: %w`, s, ne.Err)
	}
	return n, err
}

package engine

import (
	"context"
	"time"

	"conex/internal/container"

	apic "github.com/moby/moby/api/types/container"
)

// minHealthTime is Docker's least duration of a health check.
const minHealthTime = time.Millisecond

// validateHealth checks a request's own health check; what the image says was never refused by Docker either.
func validateHealth(_ context.Context, conf *apic.Config, _ *apic.HostConfig) error {
	h := conf.Healthcheck
	if h == nil {
		return nil
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"Interval", h.Interval}, {"Timeout", h.Timeout}, {"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval}} {
		if d.value != 0 && d.value < minHealthTime {
			return invalid("%s in Healthcheck cannot be less than %s", d.name, minHealthTime)
		}
	}
	if h.Retries < 0 {
		return invalid("Retries in Healthcheck cannot be negative")
	}
	if _, err := container.ParseProbe(h.Test); err != nil {
		return invalid("%w", err)
	}
	return nil
}

// validateOnFailure wants a health check, the image's or the request's, for an action that waits for its failure.
func validateOnFailure(action string, conf *apic.Config) error {
	switch action {
	case "":
		return nil
	case "kill", "restart", "stop":
	default:
		return invalid("invalid action on a failed health check: %q; use one of 'kill', 'restart' or 'stop'", action)
	}
	if h := conf.Healthcheck; h == nil || len(h.Test) < 2 || h.Test[0] == "NONE" {
		return invalid("cannot set on-failure action to %s without a health check", action)
	}
	return nil
}

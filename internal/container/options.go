package container

// Options are what conex lets a user say about a container and Docker's HostConfig has no field for. The zero value is Docker's
// behaviour.
type Options struct {
	// HealthOnFailure is what happens when the container becomes unhealthy: "" nothing, "kill", "restart" or "stop".
	HealthOnFailure string `json:"healthOnFailure,omitempty"`
}

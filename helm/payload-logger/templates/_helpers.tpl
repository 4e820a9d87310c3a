{{/* Names and labels, by Helm's conventions. 50 characters: a StatefulSet's pods and the other objects add to it. */}}

{{- define "payload-logger.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "payload-logger.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "payload-logger.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "payload-logger.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* A selector can't be changed once it is installed: nothing that changes belongs here. */}}
{{- define "payload-logger.selectorLabels" -}}
app.kubernetes.io/name: {{ include "payload-logger.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "payload-logger.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "payload-logger.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "payload-logger.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "payload-logger.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "payload-logger.image" -}}
{{- $repository := required "image.repository: name the repository that you pushed the image to (docs/image.md)" .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "payload-logger.controller" -}}
{{- ternary "StatefulSet" "Deployment" .Values.spool.persistence.enabled -}}
{{- end -}}

{{/* Values as payload-logger and Kubernetes write them. */}}

{{/* Bytes, of "10GiB", "10Gi", "64 kB", 1024. */}}
{{- define "payload-logger.bytes" -}}
{{- $text := . | toString | replace "_" "" | lower | nospace -}}
{{- $number := regexFind "^[0-9.]+(e[+-]?[0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text | trimSuffix "b" -}}
{{- $factors := dict "" 1 "k" 1000 "ki" 1024 "m" 1000000 "mi" 1048576 "g" 1000000000 "gi" 1073741824 "t" 1000000000000 "ti" 1099511627776 -}}
{{- printf "%.0f" (mulf (float64 $number) (float64 (get $factors $unit))) -}}
{{- end -}}

{{/* Whole seconds, rounded up, of "30s", "500ms", "1min", 25. */}}
{{- define "payload-logger.seconds" -}}
{{- $text := . | toString | replace "_" "" | lower | nospace -}}
{{- $number := regexFind "^[0-9.]+(e[+-]?[0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text -}}
{{- $factors := dict "" 1 "s" 1 "ms" 0.001 "m" 60 "min" 60 "h" 3600 "d" 86400 -}}
{{- printf "%.0f" (ceil (mulf (float64 $number) (float64 (get $factors $unit)))) -}}
{{- end -}}

{{/* The port of a listener, which others have to reach. Takes key and value. */}}
{{- define "payload-logger.port" -}}
{{- $listen := .value | toString | trim -}}
{{- if hasPrefix "unix:" $listen -}}
{{- fail (printf "config.%s: %s is a Unix socket, which neither a Service nor a probe can reach; use 0.0.0.0:PORT" .key $listen) -}}
{{- end -}}
{{- if regexMatch "^(127\\.|localhost:|\\[::1\\])" $listen -}}
{{- fail (printf "config.%s: %s can't be reached from outside of the pod, by a Service or a probe; use 0.0.0.0:PORT" .key $listen) -}}
{{- end -}}
{{- regexFind "[0-9]+$" $listen -}}
{{- end -}}

{{/* The configuration: what stands in values, and what it needs here. */}}

{{/* "true" if a collection of custom logging is enabled: the SDK has to find its endpoint. */}}
{{- define "payload-logger.customLogging" -}}
{{- $collector := .Values.config.data_collector | default dict -}}
{{- range $name, $one := $collector.collections | default dict -}}
{{- if and (not (has $name (list "request" "response"))) $one (has (toString $one.enabled | trim | lower) (list "true" "yes" "on" "1")) -}}
true
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "payload-logger.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- range list "proxy" "storage" "spool" "admin" "logs" -}}
{{- $_ := set $config . (get $config . | default dict) -}}
{{- end -}}
{{- if not $config.endpoint_name -}}
{{- $_ := set $config "endpoint_name" (include "payload-logger.fullname" .) -}}
{{- end -}}
{{- $_ := set $config.proxy "listen" ($config.proxy.listen | default "0.0.0.0:8080") -}}
{{- $_ := set $config.admin "listen" ($config.admin.listen | default "0.0.0.0:8081") -}}
{{- $_ := set $config.logs "format" ($config.logs.format | default "json") -}}
{{- $_ := set $config.storage "url" ($config.storage.url | default "file:///var/lib/payload-logger/data") -}}
{{- $_ := set $config.spool "path" ($config.spool.path | default "/var/lib/payload-logger/spool") -}}
{{- if kindIs "invalid" $config.proxy.drain_seconds -}}
{{- $_ := set $config.proxy "drain_seconds" 30 -}}
{{- end -}}
{{- if kindIs "invalid" $config.spool.max_bytes -}}
{{- $_ := set $config.spool "max_bytes" (mulf (float64 (include "payload-logger.bytes" .Values.spool.size)) 0.8 | int64) -}}
{{- end -}}
{{- if not $config.proxy.upstream -}}
{{- if eq .Values.mode "sidecar" -}}
{{- $_ := set $config.proxy "upstream" (printf "http://127.0.0.1:%.0f" (float64 .Values.model.port)) -}}
{{- else -}}
{{- $_ := set $config.proxy "upstream" (required "gateway.upstream: name the Service to stand before, as http://SERVICE.NAMESPACE.svc:PORT" .Values.gateway.upstream) -}}
{{- end -}}
{{- end -}}
{{- if .Values.tls.secretName -}}
{{- $_ := set $config.proxy "tls_certificate" "/etc/payload-logger-tls/tls.crt" -}}
{{- $_ := set $config.proxy "tls_key" "/etc/payload-logger-tls/tls.key" -}}
{{- end -}}
{{- if or .Values.upstreamCa.configMapName .Values.upstreamCa.secretName -}}
{{- $_ := set $config.proxy "upstream_ca" (printf "/etc/payload-logger-upstream-ca/%s" .Values.upstreamCa.key) -}}
{{- end -}}
{{- if include "payload-logger.customLogging" . -}}
{{- $custom := $config.custom_logging | default dict -}}
{{- $_ := set $custom "listen" ($custom.listen | default "127.0.0.1:50011") -}}
{{- $_ := set $custom "sdk_config_path" ($custom.sdk_config_path | default "/run/payload-logger/sdk.json") -}}
{{- $_ := set $config "custom_logging" $custom -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* A pod's end, in seconds. 25: up to 20 to write and ship what is left, 5 to be sure. */}}

{{- define "payload-logger.endSeconds" -}}
{{- $config := include "payload-logger.config" . | fromYaml -}}
{{- $model := ternary .Values.model.shutdownSeconds 0 (eq .Values.mode "sidecar") -}}
{{- add .Values.preStopSeconds $model (include "payload-logger.seconds" $config.proxy.drain_seconds) 25 -}}
{{- end -}}

{{- define "payload-logger.terminationGracePeriodSeconds" -}}
{{- $needed := include "payload-logger.endSeconds" . | int -}}
{{- $given := .Values.terminationGracePeriodSeconds -}}
{{- if kindIs "invalid" $given -}}
{{- $needed -}}
{{- else -}}
{{- if lt (int $given) $needed -}}
{{- $model := ternary (printf " + model.shutdownSeconds (%d)" (int .Values.model.shutdownSeconds)) "" (eq .Values.mode "sidecar") -}}
{{- fail (printf "terminationGracePeriodSeconds: %d is less than the %d seconds that a pod's end can take: preStopSeconds (%d)%s + config.proxy.drain_seconds + 25 to write and ship what is left; leave it out, or lower one of these" (int $given) $needed (int .Values.preStopSeconds) $model) -}}
{{- end -}}
{{- int $given -}}
{{- end -}}
{{- end -}}

{{/* Goes on serving while the pod's address leaves every Service and load balancer. The kubelet sleeps from 1.30 on. */}}
{{- define "payload-logger.preStop" -}}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version -}}
sleep:
  seconds: {{ .Values.preStopSeconds }}
{{- else -}}
exec:
  command: [sleep, {{ .Values.preStopSeconds | toString | quote }}]
{{- end -}}
{{- end -}}
